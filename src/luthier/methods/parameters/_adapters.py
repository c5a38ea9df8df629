"""The common ground of the methods that put a peft adapter on a frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from luthier.core.protocols import Context
from luthier.core.registry import TOKEN_TASKS
from luthier.functional.adapters import TASK_TYPES, check_merge, heads, merged

# Nearly every adapter freezes what these train.
FREEZES = {
    "parameters:full": "full trains every tensor and an adapter freezes the base; name one of the two",
    "parameters:half-ft": "half-ft trains tensors of the base and an adapter freezes them; name one of the two",
}

ADAPTERS = ("dora", "ia3", "lora", "loramoe", "prefix-tuning", "prompt-tuning", "qlora", "scale-shift-features")


def alone(slug: str) -> dict[str, str]:
    """The conflicts of an adapter with the others: a saved folder holds one."""
    reason = f"a model is saved with one adapter; merge that of one run, and train '{slug}' on the result"
    return {f"parameters:{other}": reason for other in ADAPTERS if other != slug}


def task_name(ctx: Context) -> str:
    """The task's name, before training and in it."""
    return str(getattr(ctx.task, "name", ctx.task))


def common(model: torch.nn.Module, ctx: Context, *, merge: str = "") -> dict[str, Any]:
    """What every peft configuration has: the task, and a classification head that is trained in full and saved.

    Args:
        model: the base.
        ctx: its task.
        merge: the slug of a method that will merge at the end; it is refused now where it could not.
    """
    if merge:
        check_merge(model, merge)
    task = task_name(ctx)
    return {
        "task_type": TASK_TYPES.get(task),
        "modules_to_save": None if task in TOKEN_TASKS else heads(model) or None,
    }


@contextmanager
def drawing(ctx: Context, slug: str) -> Iterator[None]:
    """Within the block torch's global generator, from which peft draws, is our ``init`` stream; then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.rng("init", slug).initial_seed())
        yield


class Adapter:
    """What the parameter methods with an adapter have in common.

    Attributes:
        slug: the method's name, for error texts.
        marks: what the names of the adapter's tensors hold.
        merge: whether the merged model is saved instead of the adapter.
    """

    slug = ""
    marks: tuple[str, ...] = ()
    merge = False

    def opened(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The adapter's tensors, and the head that is saved with it."""
        marks = (*self.marks, "modules_to_save")
        return [p for n, p in model.named_parameters() if p.requires_grad and any(mark in n for mark in marks)]

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """One group of the adapter's tensors and the head."""
        return [{"params": self.opened(model)}]

    def on_grad(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Any]:
        """No state beside the weights."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def export(self, model: torch.nn.Module) -> torch.nn.Module:
        """The peft model, saved as an adapter; with ``merge`` a copy with the adapter in the weights."""
        return merged(model, self.slug) if self.merge else model
