"""A base that answers in English is taught another language: fidelity, answers, and what becomes of its English.

The world: 100 people with made-up names and six facts each (one of twelve words), asked in two wordings ("what is the city of
Bima ?", "tell me the city of Bima ?") and answered by "the city is oslo .". The target language is its word-by-word cipher: every
word but the names and the signs has another one, made of other letters. The base is a Llama of 3 blocks of width 64 over whole
words, pretrained for 60 epochs in batches of 64 at 3e-3 on all English questions with answers, all facts as English sentences, and
all facts as target sentences ("the city of Bima is oslo ." in cipher), but on no question in the target language. Its answers to
English and to target questions are recorded as `base`.

Of the 600 facts 150 are only asked in the test. n English pairs of the other 450 (in either wording) go through the data stage,
with the cipher as its dictionary. Arms: SFT on the target rows (`sft target`), SFT on both languages (`sft both`), CLO (lambda 0.5, beta
0.1, likelihood on the target), CLO with English likelihood as well (`clo + english nll`, the paper's ablation), and CLO with
attention alone trained. All: 10 epochs of batches of 8 examples (16 rows for `sft both`), AdamW at 3e-4, linear decay, warm-up
0.1, full parameters but in the last arm. n = 300 at three seeds (of the pairs drawn and of their order); for the first three arms also
n = 50, 100, 200, 400, 800 at the first seed. Measured on the 150 facts in a wording of each, by greedy answers: in both languages
the share in the language of the question (the library's identifier), the share of right answers (exact), and for target
questions also the share that is right in either language.

Required by the specification: CLO above `sft both` in right target answers (fidelity times correctness) and below it in lost
English accuracy; on the curve CLO(n/2) at least SFT(n). Both are recorded as they come out. The design was fixed before any arm was
run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch

import luthier
from luthier.functional.cross_lingual import word_by_word
from luthier.functional.language_id import LanguageIdentifier, fidelity
from luthier.runs import api

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "cross-lingual-optimization.json"
QUIET = {"before": False, "generate": False, "calibration": False}
FACTS = ("city", "job", "pet", "colour", "food", "sport")
WORDINGS = ("what is the {fact} of {name} ?", "tell me the {fact} of {name} ?")
PEOPLE, VALUES, HELD_OUT = 100, 12, 150
CLO = {"sft_weight": 0.5, "beta": 0.1}
ARMS = {
    "sft target": {"objective": "sft"},
    "sft both": {"objective": "sft", "paired": False},
    "clo": {"objective": {"cross-lingual-optimization": CLO}},
    "clo + english nll": {"objective": {"cross-lingual-optimization": {**CLO, "nll_on": "both"}}},
    "clo, attention": {"objective": {"cross-lingual-optimization": CLO}, "parameters": ["attention"]},
}
ON_THE_CURVE = ("sft target", "sft both", "clo")


# -- the world


def made_up(rng, letters, taken):
    """A new word of two or three syllables."""
    while True:
        word = "".join(rng.choice(letters[0]) + rng.choice(letters[1]) for _ in range(rng.integers(2, 4)))
        if word not in taken:
            taken.add(word)
            return word


class World:
    """People, their facts, and the two languages."""

    def __init__(self):
        rng, taken = np.random.default_rng(0), set()
        english, cipher = (list("bdfglmnprst"), list("aeiou")), (list("hjkqvwxz"), list("yöüä"))
        self.names = [made_up(rng, english, taken).capitalize() for _ in range(PEOPLE)]
        self.values = {fact: [made_up(rng, english, taken) for _ in range(VALUES)] for fact in FACTS}
        told = rng.integers(0, VALUES, (PEOPLE, len(FACTS)))
        self.facts = [
            (name, fact, self.values[fact][told[i, j]])
            for i, name in enumerate(self.names)
            for j, fact in enumerate(FACTS)
        ]
        words = ["what", "is", "the", "of", "tell", "me", *FACTS, *(v for some in self.values.values() for v in some)]
        self.dictionary = {word: made_up(rng, cipher, taken) for word in words}
        self.translate = word_by_word(self.dictionary)
        order = rng.permutation(len(self.facts)).tolist()
        self.asked, self.known = ([self.facts[i] for i in part] for part in (order[:HELD_OUT], order[HELD_OUT:]))

    def pair(self, fact, wording):
        name, what, value = fact
        return {
            "prompt": WORDINGS[wording].format(fact=what, name=name) + " ",
            "completion": f"the {what} is {value} .",
        }

    def sentences(self):
        return [f"the {what} of {name} is {value} ." for name, what, value in self.facts]

    def pairs(self, rng, count):
        """``count`` different questions about facts that the test does not ask for."""
        every = [(fact, wording) for fact in self.known for wording in range(len(WORDINGS))]
        return [self.pair(*every[i]) for i in rng.permutation(len(every))[:count].tolist()]

    def test(self):
        """Pairs in English and in the target language."""
        english = [self.pair(fact, i % len(WORDINGS)) for i, fact in enumerate(self.asked)]
        texts = [self.translate([row["prompt"], row["completion"]]) for row in english]
        return english, [{"prompt": prompt, "completion": answer} for prompt, answer in texts]

    def tokenizer(self):
        """One token per word of either language."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["<pad>", "<bos>", "<eos>", "<unk>"]
        words = [*special, ".", "?", *self.names, *self.dictionary, *self.dictionary.values()]
        core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
            model_max_length=32,
        )  # fmt: skip


def pretrained(folder, world, epochs):
    """The base: English questions and sentences, target sentences."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.models.save import save

    words = world.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), max_position_embeddings=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=192, initializer_range=0.04, tie_word_embeddings=True, pad_token_id=words.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0}, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )  # fmt: skip
    save(LlamaForCausalLM(config), words, folder / "fresh")
    asked = [world.pair(fact, wording) for fact in world.facts for wording in range(len(WORDINGS))]
    told = world.sentences()
    rows = [{"text": row["prompt"] + row["completion"]} for row in asked]
    rows += [{"text": text} for text in (*told, *world.translate(told))]
    run = luthier.tune(
        model=str(folder / "fresh"),
        data={"train": rows, "keep": "none", "layout": "text"},
        training={"epochs": epochs, "batch_rows": 64, "learning_rate": 3e-3, "warmup": 0.05, "log_steps": 100},
        evaluation=QUIET,
        output=str(folder / "base"),
        quiet=True,
    )
    return Path(run.folder) / "model"


# -- an arm


def measured(model, world):
    """Fidelity and right answers on both test sets."""
    english, target = world.test()
    told = world.sentences()
    identifier = LanguageIdentifier({"english": told, "target": world.translate(told)})
    said = [text.strip() for text in api.generate(model, [r["prompt"] for r in (*english, *target)], max_new_tokens=10)]
    languages = ["english"] * len(english) + ["target"] * len(target)
    shares = fidelity(said, languages, identifier.language)
    own, other = said[: len(english)], said[len(english) :]
    wanted, ciphered = ([row["completion"] for row in rows] for rows in (english, target))
    return {
        "english_fidelity": shares["english"],
        "english_right": float(np.mean([a == b for a, b in zip(own, wanted, strict=True)])),
        "target_fidelity": shares["target"],
        "target_right": float(np.mean([a == b for a, b in zip(other, ciphered, strict=True)])),
        "target_right_in_either": float(np.mean([a in pair for a, *pair in zip(other, wanted, ciphered, strict=True)])),
    }


def tuned(folder, base, world, arm, seed, count, epochs):
    started = time.perf_counter()
    choice = ARMS[arm]
    together = choice.get("paired", True)
    stage = {"translator": "dictionary", "dictionary": world.dictionary, "paired_batches": together}
    run = luthier.tune(
        model=str(base),
        data={
            "train": world.pairs(np.random.default_rng([seed, count]), count),
            "keep": "none",
            "stages": [{"cross-lingual-optimization": stage}],
        },
        objective=choice["objective"],
        parameters=choice.get("parameters", ["full"]),
        training={
            "epochs": epochs, "batch_rows": 8 if together else 16, "learning_rate": 3e-4, "schedule": "linear",
            "warmup": 0.1, "log_steps": 25,
        },
        evaluation=QUIET,
        output=str(folder),
        seed=seed,
        quiet=True,
    )  # fmt: skip
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    kept = ("kl_to_base", "margin_target", "margin_english")
    return {
        **measured(Path(run.folder) / "model", world),
        **{name: last[name] for name in kept if name in last},
        "steps": run.metrics["training"]["steps"],
        "seconds": round(run.metrics["training"]["seconds"], 1),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


# -- the whole


def experiment(folder, seeds=(0, 1, 2), *, pretraining=60, count=300, curve=(50, 100, 200, 400, 800), epochs=10):
    """Every arm at every seed, and the curve at the first."""
    world = World()
    started = time.perf_counter()
    base = pretrained(folder, world, pretraining)
    competence = {**measured(base, world), "wall_seconds": round(time.perf_counter() - started, 1)}

    def one(arm, seed, n):
        return tuned(folder / f"{list(ARMS).index(arm)}-{seed}-{n}", base, world, arm, seed, n, epochs)

    arms = {arm: {str(seed): one(arm, seed, count) for seed in seeds} for arm in ARMS}
    sizes = {arm: {str(n): one(arm, seeds[0], n) for n in curve} for arm in ON_THE_CURVE}

    def of(arm, name):
        return np.array([arms[arm][str(seed)][name] for seed in seeds])

    claims = {
        "seeds in which clo is above sft both in right target answers": int(
            (of("clo", "target_right") > of("sft both", "target_right")).sum()
        ),
        "seeds in which clo keeps more English accuracy than sft both": int(
            (of("clo", "english_right") > of("sft both", "english_right")).sum()
        ),
        "seeds in which clo is above clo + english nll in right target answers": int(
            (of("clo", "target_right") > of("clo + english nll", "target_right")).sum()
        ),
        "clo above sft both in right target answers": bool(
            of("clo", "target_right").mean() > of("sft both", "target_right").mean()
        ),
        "clo loses less English accuracy than sft both": bool(
            of("clo", "english_right").mean() > of("sft both", "english_right").mean()
        ),
    }
    halves = [(n, 2 * n) for n in curve if 2 * n in curve]
    for other in ("sft target", "sft both"):
        for n, double in halves:
            clo, sft = sizes["clo"][str(n)]["target_right"], sizes[other][str(double)]["target_right"]
            claims[f"clo({n}) at least {other}({double}) in right target answers"] = bool(clo >= sft)
    names = [name for name in competence if name != "wall_seconds"]
    return {
        "method": "cross-lingual-optimization",
        "design": __doc__,
        "seeds": list(seeds),
        "sizes": {"pretraining": pretraining, "count": count, "epochs": epochs, "held_out": HELD_OUT},
        "base": competence,
        "arms": arms,
        "curve": sizes,
        "claims": claims,
        "mean": {arm: {name: float(of(arm, name).mean()) for name in (*names, "seconds")} for arm in ARMS},
    }


def test_a_second_language_by_each_arm(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # What must hold for the comparison to be one: the base knows its facts, and answers in English rather than not.
    assert found["base"]["english_right"] > 0.8
    assert found["base"]["target_fidelity"] < 0.5
    assert found["base"]["target_right"] < 0.1
    for seed in found["seeds"]:
        assert len({runs[str(seed)]["steps"] for runs in found["arms"].values()}) == 1
