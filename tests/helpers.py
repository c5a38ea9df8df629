"""Small models and rows for tests of the engine: no files, no network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from luthier.core import registry
from luthier.engine.distributed import Processes
from luthier.engine.optimizer import open_parameters
from luthier.engine.session import Session
from luthier.engine.stack import Setup, Stack, as_objective
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.recipe.schema import Training
from luthier.tasks.causal_lm import CausalLM
from luthier.tasks.masked_lm import MaskedLM


class TinyProcessor:
    """What the engine and the methods read of a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id, mask_token_id = 0, 1, 2, None
    all_special_ids = [0, 1, 2]

    def __len__(self) -> int:
        return 64

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return written([i for i in ids if not (skip_special_tokens and i in self.all_special_ids)])


class MaskingProcessor(TinyProcessor):
    """The same with a mask token, as encoders have it."""

    mask_token_id = 3
    all_special_ids = [0, 1, 2, 3]


PROCESSOR, MASKING = TinyProcessor(), MaskingProcessor()


def tiny_llama(seed: int = 0, *, vocabulary: int = 64, tied: bool = False, dropout: float = 0.0) -> LlamaForCausalLM:
    """A Llama of about 20k parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tiny_bert(seed: int = 0, *, dropout: float = 0.0) -> BertForMaskedLM:
    """An encoder of about 10k parameters."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForMaskedLM(config)


class MemoryRows:
    """Prepared rows held in memory, with the interface of ``luthier.data.prepare.Prepared``."""

    task = "causal-lm"
    labels: tuple[str, ...] = ()

    def __init__(self, rows: list[tuple[list[int], list[int]]], columns: dict[str, list[Any]] | None = None) -> None:
        self.columns = columns or {}
        self.ids = [np.asarray(ids, dtype=np.int32) for ids, _ in rows]
        self.spans = [np.asarray(spans, dtype=np.int32) for _, spans in rows]
        self.lengths = np.asarray([len(i) for i in self.ids], dtype=np.int32)
        self.keys = [f"{index:032x}" for index in range(len(rows))]

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, index: Any) -> dict[str, list[Any]]:
        index = [int(i) for i in index]
        return {
            "input_ids": [self.ids[i] for i in index],
            "spans": [self.spans[i] for i in index],
            "key": [self.keys[i] for i in index],
            **{name: [values[i] for i in index] for name, values in self.columns.items()},
        }


def written(ids: list[int]) -> str:
    """Token ids as the text of a canonical row."""
    return " ".join(map(str, ids))


def random_rows(count: int = 24, *, seed: int = 0, vocabulary: int = 64) -> MemoryRows:
    """Rows of 4 to 15 tokens, the second half supervised, with the columns of canonical pairs, negatives and scores."""
    rng, other = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    rows = []
    columns: dict[str, list[Any]] = {"prompt": [], "completion": [], "negatives": []}
    for _ in range(count):
        length = int(rng.integers(4, 16))
        ids = [1, *rng.integers(3, vocabulary, size=length - 2).tolist(), 2]
        rows.append((ids, [length // 2, length]))
        columns["prompt"].append(written(ids[1 : length // 2]))
        columns["completion"].append(written(ids[length // 2 : -1]))
        drawn = [other.integers(3, vocabulary, size=int(other.integers(0, 6))).tolist() for _ in range(4)]
        columns["negatives"].append([written(ids) for ids in drawn])
    nothing = {name: [None] * count for name in ("separator", "system", "messages", "tools")}
    nothing["extra"] = [None] * count
    third = np.random.default_rng([seed, 3])
    columns["rejected_ids"], columns["rejected_spans"] = [], []
    for ids, spans in rows:
        said = third.integers(3, vocabulary, size=int(third.integers(1, 8))).tolist()
        columns["rejected_ids"].append(np.asarray([*ids[: spans[0]], *said, 2], dtype=np.int32))
        columns["rejected_spans"].append(np.asarray([spans[0], spans[0] + len(said) + 1], dtype=np.int32))
    columns["ref_score"] = np.random.default_rng([seed, 2]).normal(-3.0, 1.0, size=count).tolist()
    return MemoryRows(rows, {"kind": ["pair"] * count, **columns, **nothing})


def render(rows: Any) -> Any:
    """Canonical pairs whose texts are token ids, rendered as :func:`random_rows` has them."""
    prompts = [[1, *map(int, row["prompt"].split())] for row in rows]
    whole = [[*p, *map(int, row["completion"].split()), 2] for p, row in zip(prompts, rows, strict=True)]
    made = MemoryRows([(ids, [len(p), len(ids)]) for p, ids in zip(prompts, whole, strict=True)])
    fetched = made.fetch(range(len(made)))
    del fetched["key"]
    return CausalLM(PROCESSOR).collate(fetched, range(len(made)))


class OpenAll:
    """Full fine-tuning in six lines, so that engine tests stand on the engine alone."""

    def apply(self, model: Any, ctx: Any) -> Any:
        return model.requires_grad_(True)

    def groups(self, model: Any) -> list[dict[str, Any]]:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def on_grad(self, model: Any, ctx: Any) -> None: ...

    def on_step(self, model: Any, ctx: Any) -> None: ...

    def export(self, model: Any) -> Any:
        return model


class LooksFirst(OpenAll):
    """Full fine-tuning after a forward pass over some rows."""

    def prepare(self, ctx: Any, dataset: Any) -> None:
        batch = ctx.task.collate(dataset.fetch(range(4)), range(4))
        self.seen = ctx.forward(batch, grad=False).logp_N.sum()


# A tiny model, its processor and its task, for a method to be tried on.
BEDS: dict[str, tuple[Any, Any, Any]] = {
    "causal-lm": (tiny_llama, PROCESSOR, CausalLM),
    "masked-lm": (tiny_bert, MASKING, MaskedLM),
}


KEYS = {"objective": "objective", "transform": "transforms", "selection": "selector", "parameters": "parameters"}


def stack_with(method: Any, options: Any) -> dict[str, Any]:
    """A method, and those that it requires with their example options, as arguments of :func:`make_session`."""
    needed = [(registry.get(*fact.split(":", 1)), method.beside.get(fact)) for fact in method.requires]
    stack: dict[str, Any] = {}
    for one, given in [(method, options), *((m, given or m.example) for m, given in needed if m.axis in KEYS)]:
        built = as_objective(one.build(given)) if one.axis == "objective" else one.build(given)
        if one.axis in ("transform", "parameters"):
            stack.setdefault(KEYS[one.axis], []).append(built)
        else:
            stack[KEYS[one.axis]] = built
    return stack


def make_session(
    model: Any = None,
    *,
    task: str = "causal-lm",
    seed: int = 0,
    processes: Processes | None = None,
    given: dict[str, Any] | None = None,
    **stack: Any,
) -> Session:
    """A session over a tiny model with plain SFT, unless told otherwise."""
    make, processor, kind = BEDS[task]
    objective = stack.pop("objective", None) or SupervisedFineTuning()
    parameters = stack.pop("parameters", None) or [OpenAll()]
    named = {"objective": objective, **{f"parameters#{i}": p for i, p in enumerate(parameters)}}
    named |= {f"transform#{i}": t for i, t in enumerate(stack.get("transforms", []))}
    if stack.get("selector"):
        named["selector"] = stack["selector"]
    made = Stack(objective=objective, parameters=parameters, named=named, **stack)
    model = model or make()
    made.call("prepare_model", model, processor)
    model = open_parameters(model, made, Setup(seed=seed, task=task, processor=processor, given=given or {}))
    return Session(
        model=model,
        task=kind(processor),
        processor=processor,
        stack=made,
        processes=processes or Processes(device="cpu"),
        seed=seed,
        fingerprint="",
        render=render,
    )


def settings(**values: Any) -> Training:
    """A training section with test-sized defaults."""
    return Training(**{"learning_rate": 1e-2, "batch_rows": 8, "log_steps": 1, "warmup": 0.0, **values})


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}
