"""What rollouts cost: completions per second against one prompt at a time, and where the time of a GRPO step goes.

    python bench/rollouts.py [--small]

A random Llama of the size of ``lab:small`` (2M parameters), 256 completions of 64 tokens. The second part trains GRPO
(32 prompts, 8 completions each, 64 tokens) and times writing, forward passes, backward passes and the whole step. The
result is kept in ``docs/measured/rollout-speed.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import PROCESSOR, MemoryRows, make_session, settings  # noqa: E402
from luthier.engine import head, session  # noqa: E402
from luthier.engine.loop import Trainer  # noqa: E402
from luthier.functional import writing  # noqa: E402
from luthier.lab.bases import MAKINGS  # noqa: E402
from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization  # noqa: E402
from luthier.methods.transforms import rollouts  # noqa: E402

RESULT = ROOT / "docs" / "measured" / "rollout-speed.json"
VOCABULARY = 1024


class Names(type(PROCESSOR)):
    """A tokenizer whose end token is never drawn, so that every completion has its full length."""

    eos_token_id = None

    def __len__(self) -> int:
        return VOCABULARY


def model() -> LlamaForCausalLM:
    """A random model of the size of lab:small that has no end token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, **MAKINGS["small"].config,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    made.generation_config.eos_token_id = None
    return made


def prompts(count: int) -> list[list[int]]:
    """Prompts of 8 to 24 tokens."""
    rng = np.random.default_rng(0)
    return [[1, *rng.integers(3, VOCABULARY, size=int(rng.integers(7, 24))).tolist()] for _ in range(count)]


def writing_speed(count: int, tokens: int, alone: int) -> dict[str, Any]:
    """Seconds for all completions together, and for ``alone`` of them one at a time."""
    made, asked = model().eval(), prompts(count)
    ctx = SimpleNamespace(processor=Names(), device=torch.device("cpu"))
    uniform = torch.rand(count, tokens)

    def write(some: list[list[int]], rows: int) -> float:
        began = time.perf_counter()
        found = writing.completions(
            made, some, ctx, batch_rows=rows, max_new_tokens=tokens, sampling=writing.Sampling(),
            uniform_PT=uniform[: len(some)],
        )  # fmt: skip
        assert all(len(c.token_ids) == tokens for c in found)
        return time.perf_counter() - began

    write(asked[:4], 4)
    single, together = write(asked[:alone], 1) / alone, write(asked, 256) / count
    return {
        "completions": count,
        "tokens": tokens,
        "seconds per completion, one prompt at a time": single,
        "seconds per completion, together": together,
        "times as fast": single / together,
        "tokens per second, together": tokens / together,
    }


class Clock:
    """Adds up the time inside some functions, counted once where they call one another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = 0

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Replace a function by one that is timed."""
        real = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._inside += 1
            began = time.perf_counter()
            try:
                return real(*arguments, **options)
            finally:
                self._inside -= 1
                if not self._inside:
                    self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - began

        setattr(owner, name, timed)


def step_shares(rows: int, samples: int, tokens: int, steps: int) -> dict[str, Any]:
    """Where the time of a GRPO step goes."""
    data = MemoryRows([([*p, 5], [len(p), len(p) + 1]) for p in prompts(rows * steps)])
    made = rollouts.Rollouts(
        reward={"regex": {"pattern": "[0-4]$"}}, samples=samples, max_new_tokens=tokens, batch_rows=256
    )
    run = make_session(model(), objective=GroupRelativePolicyOptimization(beta=0.04), transforms=[made])
    run.processor = Names()
    clock = Clock()
    clock.watch(rollouts, "completions", "generation")
    clock.watch(session.TaskModule, "forward", "forward")
    clock.watch(head.HeadOutputs, "statistic", "forward")
    clock.watch(torch.Tensor, "backward", "backward")
    trainer = Trainer(run, data, settings(batch_rows=rows, epochs=1, learning_rate=1e-5))
    trainer._step()  # the first step warms up
    clock.seconds.clear()
    began = time.perf_counter()
    for _ in range(steps - 1):
        trainer._step()
    whole = time.perf_counter() - began
    shares = {name: seconds / whole for name, seconds in clock.seconds.items()}
    return {
        "prompts": rows,
        "samples": samples,
        "tokens": tokens,
        "seconds per step": whole / (steps - 1),
        "share of the step": shares,
        "share outside of them": 1 - sum(shares.values()),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few completions, nothing is kept")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    found = {
        "design": __doc__,
        "threads": 1,
        "writing": writing_speed(16, 8, 4) if small else writing_speed(256, 64, 24),
        "grpo step": step_shares(4, 4, 8, 3) if small else step_shares(32, 8, 64, 4),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if not small:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
