"""What all contestants share: rows, a tokenizer, freshly initialised models, and the arithmetic a step needs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"


@dataclass(frozen=True)
class Size:
    """A Llama with tied embeddings."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int

    def parameters(self) -> int:
        """Trained numbers: embedding, layers, norms."""
        return self.vocabulary * self.hidden + self.layers * (self.matrices() + 2 * self.hidden) + self.hidden

    def matrices(self) -> int:
        """Numbers in the matrices of one layer."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.inner

    def flops(self, lengths: list[int], supervised: int) -> float:
        """Operations in the matrix products that a training step cannot avoid.

        Forward and twice that backward, no padding, attention over the causal half, the head at supervised positions.
        """
        linear = 6 * self.layers * self.matrices() * sum(lengths)
        attention = 6 * self.layers * self.hidden * sum(n * n for n in lengths)
        return linear + attention + 6 * self.vocabulary * self.hidden * supervised


SIZES = {
    "0.2M": Size(vocabulary=512, hidden=64, inner=192, layers=3, heads=4),
    "11M": Size(vocabulary=32_000, hidden=256, inner=688, layers=4, heads=4),
    "50M": Size(vocabulary=32_000, hidden=512, inner=1408, layers=10, heads=8),
}


def gsm8k() -> list[tuple[str, str]]:
    """(prompt, completion) pairs: GSM8K where it is beside the checkout, else generated ones of like lengths."""
    if SHARED.exists():
        rows = [json.loads(line) for line in SHARED.open(encoding="utf-8")]
        return [(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in rows]
    return list(_generated(random.Random(0)))


def _generated(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Word lengths as in GSM8K: prompts about 46 +- 18 words, completions about 60 +- 30."""
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(20_000)]
    for _ in range(7473):
        sizes = (max(8, round(rng.gauss(46, 18))), max(6, round(rng.gauss(60, 30))))
        texts = [
            " ".join(rng.choice(words) if rng.random() > 0.2 else str(rng.randint(0, 999)) for _ in range(n))
            for n in sizes
        ]
        yield f"Question: {texts[0]}\nAnswer:", f" {texts[1]}\n#### {rng.randint(0, 999)}"


def short(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows so small that a step is overhead more than arithmetic: the question's end and the final answer."""
    return [(prompt[-40:], " " + re.split(r"####\s*", completion)[-1][:8]) for prompt, completion in rows]


def write(folder: Path, name: str, count: int, seed: int = 0) -> Path:
    """A folder with ``rows.jsonl``, ``tokenizer`` and ``model`` for the size of that name."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size, rows = SIZES[name], gsm8k()
    rows = short(rows) if name == "0.2M" else rows
    folder.mkdir(parents=True)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((p + c for p, c in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    random.Random(seed).shuffle(rows)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for prompt, completion in rows[:count]:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    (folder / "size.json").write_text(json.dumps(asdict(size)), encoding="utf-8")
    return folder
