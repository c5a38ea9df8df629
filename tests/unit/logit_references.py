"""Nuclear norms and sketches in numpy, float64, the long way."""

from __future__ import annotations

import numpy as np


def svd_norm(z):
    return np.linalg.svd(np.asarray(z, dtype=np.float64), compute_uv=False).sum()


def fft_sketch(z, drawn):
    """The paper's order of operations: pad, sign, FFT, real part, keep, scale; over the vocabulary, then over time."""
    d2, d1 = drawn["vocabulary_signs"].numpy().astype(float), drawn["time_signs"].numpy().astype(float)
    i2, i1 = drawn["vocabulary_frequencies"].numpy(), drawn["time_frequencies"].numpy()
    padded = np.zeros((len(d1), len(d2)))
    padded[: len(z)] = z
    x = np.fft.fft(padded * d2[None], axis=1).real[:, i2] * np.sqrt(len(d2) / len(i2))
    x = np.fft.fft(x * d1[:, None], axis=0).real[i1] * np.sqrt(len(d1) / len(i1))
    return x.flatten()
