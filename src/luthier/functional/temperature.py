"""Temperature scaling: one number that makes a classifier's confidences agree with how often it is right.

    T = argmin_T  mean_n -log softmax(z_n / T)[y_n]

The ranking of the classes stays, so accuracy does too. In beta = 1/T the loss is convex, with the derivative
``mean_n (sum_c p_nc z_nc - z_n,y_n)``, ``p = softmax(beta z)``; T is where it is zero.

Source: "On Calibration of Modern Neural Networks", 2017, arXiv 1706.04599.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Where all predictions are right a smaller T is always better, and where they are worse than chance a larger one.
SMALLEST, LARGEST = 0.05, 20.0


def log_softmax(logits: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """[N, C] log-probabilities of logits divided by a temperature, float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fit_temperature(logits: ArrayLike, label: ArrayLike) -> float:
    """The temperature with the lowest mean NLL, between 0.05 and 20.

    Args:
        logits: [N, C] logits or log-probabilities of predictions the model was not trained on.
        label: [N] int, the true classes.

    Raises:
        ValueError: there is no prediction.
    """
    from scipy.optimize import brentq

    z_NC, y_N = np.asarray(logits, np.float64), np.asarray(label, np.int64)
    if len(z_NC) == 0:
        raise ValueError("a temperature cannot be fitted to no predictions")
    z_NC = z_NC - z_NC.max(axis=-1, keepdims=True)
    own = z_NC[np.arange(len(y_N)), y_N].mean()

    def slope(beta: float) -> float:
        p_NC = np.exp(beta * z_NC)
        return float(((p_NC / p_NC.sum(-1, keepdims=True)) * z_NC).sum(-1).mean() - own)

    # The slope rises with beta: no sign change means that an end of the range is best.
    if slope(1 / LARGEST) >= 0:
        return LARGEST
    if slope(1 / SMALLEST) <= 0:
        return SMALLEST
    return float(1 / brentq(slope, 1 / LARGEST, 1 / SMALLEST, xtol=1e-12))
