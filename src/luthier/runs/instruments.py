"""What a run can be measured with beside its own numbers: operations counted, predictions kept position by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from luthier.core.store import write_json
from luthier.models.info import read_json

# How many steps of a training are counted; the others are taken to cost as much as these do on average.
COUNTED_STEPS = 16


def _product_added(self_shape: Any, a_shape: Any, b_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of ``addmm_``, which torch's counter does not know."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def _attention(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Operations of attention on a CPU, both products over the whole square, as the counter does elsewhere."""
    batch, heads, length, width = query_shape
    return 2 * batch * heads * length * key_shape[-2] * (width + value_shape[-1])


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """The forward scores again, and four products more."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (3 * width + 2 * value[-1])


_OURS = {
    torch.ops.aten.addmm_: shape_wrapper(_product_added),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}


class _Counter(TorchDispatchMode):
    """Adds up operations by torch's own formulas; its ``FlopCounterMode`` also decomposes, which changes last bits."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if formula := _OURS.get(packet) or flop_registry.get(packet):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class FlopCount:
    """Floating-point operations of a training, counted in evenly spaced steps: matrix products and attention.

    Args:
        total: steps of the training.
        counted: most steps that are counted; counting slows a step down.
        found: what was counted before a training was interrupted, by step.
        save: called with all that was counted after each step that was.
    """

    def __init__(
        self,
        total: int,
        counted: int = COUNTED_STEPS,
        *,
        found: Mapping[int, int] | None = None,
        save: Callable[[dict[int, int]], None] = lambda found: None,
    ) -> None:
        self._stride = max(1, total // counted)
        self.found, self._save = dict(found or {}), save

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Count this step if it is one of those."""
        # In the middle of each stretch: the first step of an epoch is the widest one.
        if step % self._stride != self._stride // 2:
            yield
            return
        with _Counter() as counter:
            yield
        self.found[step] = counter.total
        self._save(self.found)

    def estimate(self, steps: int) -> float:
        """Operations of so many steps; NaN where none was counted."""
        return sum(self.found.values()) / len(self.found) * steps if self.found else float("nan")


@dataclass
class Instruments:
    """Given to a run, they are filled by it.

    Attributes:
        counts: one per training of the run.
        kept: every position of every source measured after training, by the source's name.
        folder: where counts are kept, so that an interrupted run loses none; None keeps them in memory.
    """

    counts: list[tuple[FlopCount, Any]] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def begin(self, trainer: Any) -> None:
        """Watch a training that is about to start."""
        file = None if self.folder is None else self.folder / f"operations-{len(self.counts)}.json"
        known = read_json(file) if file is not None and file.is_file() else {}
        count = FlopCount(
            trainer.total,
            found={int(step): flops for step, flops in known.items()},
            save=lambda found: None if file is None else write_json(file, found),
        )
        trainer.around = count.around
        self.counts.append((count, trainer))

    def flops(self) -> float:
        """Operations of all trainings of the run."""
        return sum(count.estimate(trainer.session.step) for count, trainer in self.counts)
