"""Small pictures with class labels: one coloured shape on a dark ground, moved, scaled and spoiled by noise."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from luthier.lab import Row, Task
from luthier.lab.drawing import draw, in_split, pick, pick_levels
from luthier.lab.words import SHAPES

SIZE = 16  # pixels, both ways
COLOURS = {
    "red": (220, 60, 50), "green": (70, 200, 80), "blue": (70, 100, 230), "yellow": (230, 210, 60),
    "purple": (170, 80, 210), "white": (235, 235, 235),
}  # fmt: skip
LABELS = {"shape": SHAPES, "colour": tuple(COLOURS)}
# Smallest and largest radius in pixels, and standard deviation of the noise (of 255), by difficulty.
_LEVELS = {1: (5, 6, 4.0), 2: (3, 6, 20.0), 3: (3, 5, 60.0)}


def _masks(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Which pixels the shapes cover: bool [n, SIZE, SIZE] for indices into SHAPES and centres and radii [n]."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    dx, dy = columns - x[:, None, None], rows - y[:, None, None]
    r = radius[:, None, None]
    square = np.maximum(abs(dx), abs(dy)) <= r
    distance = dx**2 + dy**2
    kinds = {
        "circle": distance <= r**2,
        "square": square,
        "triangle": square & (2 * abs(dx) <= dy + r),
        "cross": square & (np.minimum(abs(dx), abs(dy)) <= r // 3),
        "ring": (distance <= r**2) & (distance >= (r - 2) ** 2),
        "stripes": square & (dy % 3 == 0),
    }
    return np.stack([kinds[name] for name in SHAPES])[shape, np.arange(len(shape))]


_HEADER = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)  # 8 bits per channel, RGB, not interlaced


def _png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [SIZE, SIZE, 3]; by hand: an imaging library's encoder would take most of the time here."""
    # Each scan line begins with the number of its filter; 0 is none.
    lines = np.zeros((SIZE, 1 + 3 * SIZE), dtype=np.uint8)
    lines[:, 1:] = pixels.reshape(SIZE, -1)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", _HEADER), (b"IDAT", zlib.compress(lines.tobytes(), 1)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


def make(
    n: int,
    split: str,
    rng: np.random.Generator,
    *,
    skill: str = "all",
    difficulty: str | int = "all",
    label: Literal["shape", "colour"] = "shape",
) -> list[Row]:
    """Pictures of 16 x 16 pixels as PNG bytes.

    Args:
        n: how many rows.
        split: ``train`` or ``test``; no combination of shape, colour, place and size occurs in both.
        rng: where the pictures come from.
        skill: which shapes: ``all``, or some of circle, square, triangle, cross, ring, stripes, joined by commas.
        difficulty: ``all``, or some of 1 (large, almost clean), 2 (small or large, some noise), 3 (small, strong
            noise), joined by commas.
        label: ``shape`` or ``colour``.
    """
    shapes, levels = pick(skill, SHAPES, "skill"), pick_levels(difficulty)
    palette = np.array(list(COLOURS.values()))

    def propose(count: int) -> list[Row]:
        shape = np.array([SHAPES.index(name) for name in shapes])[rng.integers(0, len(shapes), count)]
        colour = rng.integers(0, len(COLOURS), count)
        level = rng.choice(levels, count)
        smallest, largest, sigma = np.array([_LEVELS[value] for value in level.tolist()]).T
        radius = rng.integers(smallest, largest + 1)
        x, y = (rng.integers(radius, SIZE - radius) for _ in range(2))
        kept = np.flatnonzero(in_split(split, 17, shape, colour, x, y, radius))
        ground = rng.integers(0, 50, (count, 1, 1, 3))
        covered = _masks(shape[kept], x[kept], y[kept], radius[kept])[..., None]
        pixels = np.where(covered, palette[colour[kept], None, None], ground[kept]).astype(np.float32)
        pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * sigma[kept, None, None, None]
        encoded = [_png(p) for p in pixels.round().clip(0, 255).astype(np.uint8)]
        chosen, accepted = (shape, SHAPES) if label == "shape" else (colour, tuple(COLOURS))
        return [
            {
                "image": {"path": None, "bytes": data}, "label": accepted[chosen[i]], "task": "pictures",
                "skill": SHAPES[shape[i]], "difficulty": int(level[i]), "answer": accepted[chosen[i]], "bytes": data,
            }
            for i, data in zip(kept.tolist(), encoded, strict=True)
        ]  # fmt: skip

    rows = draw(n, rng, [propose], key="bytes")
    for row in rows:
        del row["bytes"]
    return rows


def verify(row: Mapping[str, Any], completion: str) -> bool:
    """Whether the completion names the right class."""
    return completion.strip() == row["answer"]


task = Task("pictures", make, verify, SHAPES)
