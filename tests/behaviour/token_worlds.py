"""What the experiments on a model's own answers share: small worlds of tokens, models for them, and writing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import MemoryRows, TinyProcessor, render, settings
from luthier.engine.loop import Trainer
from luthier.engine.session import Session
from luthier.engine.stack import Stack
from luthier.functional.writing import Sampling, completions
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.parameters.full import Full
from luthier.tasks.causal_lm import CausalLM


class Words(TinyProcessor):
    """A tokenizer whose tokens are the words of a list; ids 0, 1 and 2 are padding, beginning and end."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __len__(self) -> int:
        return 3 + len(self.words)

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(self.words[int(i) - 3] for i in ids if int(i) > 2)


def network(seed: int, vocabulary: int, *, width: int = 64, layers: int = 2, positions: int = 32) -> LlamaForCausalLM:
    """A fresh small Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=positions,
            tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def rows_of(pairs: list[tuple[list[int], list[int]]], **columns: list[Any]) -> MemoryRows:
    """Prepared rows of prompts and answers; the end token is added."""
    made = [([*prompt, *answer, 2], [len(prompt), len(prompt) + len(answer) + 1]) for prompt, answer in pairs]
    nothing = {n: [None] * len(pairs) for n in ("system", "messages", "tools", "extra", "separator")}
    texts = {
        "kind": ["pair"] * len(pairs),
        "prompt": [" ".join(map(str, p[1:])) for p, _ in pairs],
        "completion": [" ".join(map(str, a)) for _, a in pairs],
    }
    return MemoryRows(made, {**nothing, **texts, **columns})


def session_of(
    model: Any, processor: Any, *, seed: int, objective: Any = None, transforms: Any = (), models: Any = None
) -> Session:
    """A session over a model of a token world, all of it trained."""
    stack = Stack(objective=objective or SupervisedFineTuning(), transforms=list(transforms), parameters=[Full()])
    stack.named = {"objective": stack.objective, "parameters": stack.parameters[0]}
    stack.named |= {f"transform#{i}": t for i, t in enumerate(stack.transforms)}
    stack.call("prepare_model", model, processor)
    model.requires_grad_(True)
    return Session(
        model=model, task=CausalLM(processor), processor=processor, stack=stack, seed=seed, models=models,
        render=render,
    )  # fmt: skip


def train(session: Session, rows: MemoryRows, observe: Any = None, **values: Any) -> list[dict[str, Any]]:
    """Train to the end; the records of the steps."""
    records: list[dict[str, Any]] = []

    def seen(event: str, record: dict[str, Any]) -> None:
        if event == "step":
            records.append(record)
        if observe is not None:
            observe(event, record)

    Trainer(session, rows, settings(schedule="constant", **values), observe=seen).run()
    return records


def write(
    model: Any,
    processor: Any,
    prompts: list[list[int]],
    *,
    most: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> list[list[Any]]:
    """Completions of each prompt: greedy at temperature 0."""
    ctx: Any = SimpleNamespace(processor=processor, device=torch.device("cpu"))
    asked = [p for p in prompts for _ in range(samples)]
    uniform = torch.rand(len(asked), most, generator=torch.Generator().manual_seed(seed))
    found = completions(
        model, asked, ctx, batch_rows=512, max_new_tokens=most,
        sampling=Sampling(temperature) if temperature else None, uniform_PT=uniform,
    )  # fmt: skip
    return [found[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def right(found: list[list[Any]], answers: list[list[int]]) -> np.ndarray:
    """[prompts, samples], whether each completion is the answer and ends."""
    return np.array([[c.token_ids == (*a, 2) for c in some] for some, a in zip(found, answers, strict=True)])


def mean_of(arms: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over the seeds of every number of every arm."""
    return {
        arm: {key: float(np.mean([run[key] for run in runs.values()])) for key in next(iter(runs.values()))}
        for arm, runs in arms.items()
    }
