"""The order of rows: a pure function of (seed, epoch), whatever the number of processes or the accumulation.

Rows are shuffled, cut into windows of many steps, sorted by length inside a window (buckets, so that little is padded)
and cut into optimiser steps; the steps of an epoch are shuffled again.
"""

from __future__ import annotations

import math

import numpy as np

from luthier.core.errors import UserError
from luthier.core.rng import numpy_stream

WINDOW_STEPS = 64


class DataOrder:
    """Which rows make up which optimiser step.

    Args:
        lengths: tokens of every row.
        seed: the run's seed; the stream is ``data``.
        batch_rows: rows of a step, or None.
        batch_tokens: upper bound of padded tokens of a step, or None. Exactly one of the two is given.
        buckets: put rows of similar length together.
        oversample: how many times more rows a step offers (online selection keeps a part of them).
        repeats: how many optimiser steps in a row have the same rows.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seed: int,
        batch_rows: int | None,
        batch_tokens: int | None = None,
        buckets: bool = True,
        oversample: int = 1,
        repeats: int = 1,
    ) -> None:
        if len(lengths) == 0:
            raise UserError("there are no rows to train on.")
        self.lengths = np.asarray(lengths)
        self.seed, self.buckets, self.oversample, self.repeats = seed, buckets, oversample, repeats
        self.batch_rows, self.batch_tokens = batch_rows, batch_tokens
        if batch_tokens is not None and int(self.lengths.max()) > batch_tokens:
            raise UserError(
                f"training.batch_tokens is {batch_tokens}, but the longest row has {int(self.lengths.max())} tokens: "
                "raise it, or shorten rows with data.max_length and data.truncation."
            )
        self._last: tuple[int, list[np.ndarray]] | None = None

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of every step of an epoch."""
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._make(epoch))
        return self._last[1]

    def _make(self, epoch: int) -> list[np.ndarray]:
        rng = numpy_stream(self.seed, "data", "order", epoch)
        shuffled = rng.permutation(len(self.lengths))
        if not self.buckets:
            return self._cut(shuffled)
        if self.batch_rows is not None:
            window = self.batch_rows * self.oversample * WINDOW_STEPS
        else:
            assert self.batch_tokens is not None
            per_step = max(1, int(self.batch_tokens / max(self.lengths.mean(), 1)))
            window = per_step * self.oversample * WINDOW_STEPS
        steps: list[np.ndarray] = []
        for start in range(0, len(shuffled), window):
            part = shuffled[start : start + window]
            steps += self._cut(part[np.argsort(self.lengths[part], kind="stable")])
        order = rng.permutation(len(steps)).tolist()
        # The widest step comes first: a model that does not fit fails at once, and later steps reuse its memory.
        order.insert(0, order.pop(int(np.argmax([len(steps[i]) * self.lengths[steps[i]].max() for i in order]))))
        return [steps[i] for i in order]

    def _cut(self, rows: np.ndarray) -> list[np.ndarray]:
        if self.batch_rows is not None:
            size = self.batch_rows * self.oversample
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        assert self.batch_tokens is not None
        budget, steps, start, longest = self.batch_tokens * self.oversample, [], 0, 0
        for end, length in enumerate(self.lengths[rows].tolist()):
            longest = max(longest, length)
            if end > start and longest * (end + 1 - start) > budget:
                steps.append(rows[start:end])
                start, longest = end, length
        steps.append(rows[start:])
        return steps

    def steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Optimiser steps of a run; a fraction of an epoch is rounded up to whole steps."""
        whole = int(epochs)
        steps = sum(self._size(e) for e in range(whole)) + math.ceil(self._size(whole) * (epochs - whole) - 1e-9)
        total = steps * self.repeats
        return max(1, min(total, max_steps) if max_steps is not None else total)

    def _size(self, epoch: int) -> int:
        """Different steps of an epoch."""
        if self.batch_rows is None:
            return len(self.epoch(epoch))
        return -(-len(self.lengths) // (self.batch_rows * self.oversample))

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, number within the epoch) of a step counted from 0."""
        epoch, step = 0, step // self.repeats
        while step >= self._size(epoch):
            step, epoch = step - self._size(epoch), epoch + 1
        return epoch, step

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, row numbers) of a step counted from 0."""
        epoch, inside = self.locate(step)
        return epoch, self.epoch(epoch)[inside]


def split(rows: np.ndarray, lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """The rows of a step cut into ``parts`` micro-batches of similar lengths; some may be empty."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    return np.array_split(ordered, parts)
