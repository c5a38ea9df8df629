"""Named random streams: adding a method changes no other method's numbers.

A stream is a pure function of (seed, name, keys): ``stream(0, "noise", step, row)`` gives the same numbers in every
process and after every resume, whatever else has drawn random numbers before.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, name: str, *keys: object) -> int:
    """A 63-bit seed from the run's seed, the stream's name and any further keys (by their ``repr``)."""
    text = "\x1f".join([str(seed), name, *(repr(k) for k in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str, *keys: object) -> torch.Generator:
    """A fresh CPU generator of the named stream."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, name, *keys))


def numpy_stream(seed: int, name: str, *keys: object) -> np.random.Generator:
    """As :func:`stream`, for numpy."""
    return np.random.default_rng(derive_seed(seed, name, *keys))
