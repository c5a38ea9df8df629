"""Regression in context under a prior of two parts, and its Bayes-optimal predictors.

    y_j = w x_j + eps,   eps ~ N(0, sigma^2)
    w uniform on {w_1 .. w_n} with probability alpha, else w ~ N(0, tau^2 I_d)

    w_c = (X^T X + sigma^2 / tau^2 I)^-1 X^T y
    w_d = sum_i pi_i w_i,                      pi_i ~ exp(-|y - X w_i|^2 / (2 sigma^2))
    w_mix = g w_d + (1 - g) w_c,               g = alpha p_d / (alpha p_d + (1 - alpha) p_c)

``p_d = mean_i N(y; X w_i, sigma^2 I_k)`` and ``p_c = N(y; 0, tau^2 X X^T + sigma^2 I_k)``, all in log space. A model
fine-tuned on the discrete part moves towards w_d also where w is continuous. Labels scaled by s, with the prediction
divided by s, leave the discrete set but stay continuous.

Source: "Understanding Catastrophic Forgetting in Language Models via Implicit Inference", ICLR 2024, arXiv 2309.10105.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Prior:
    """The prior of w.

    Attributes:
        tasks_nD: the discrete set [n, d].
        sigma: standard deviation of the noise.
        tau: of the continuous part.
        alpha: probability of the discrete part.
    """

    tasks_nD: Array
    sigma: float = 1.0
    tau: float = 1.0
    alpha: float = 0.5


@dataclass(frozen=True)
class Posterior:
    """What is known of w after k pairs; weights [d], logarithms in nats."""

    continuous: Array
    discrete: Array
    mixture: Array
    gate: float
    log_p_discrete: float
    log_p_continuous: float


def posterior(x: ArrayLike, y: ArrayLike, prior: Prior) -> Posterior:
    """The predictors of pairs x [k, d], y [k]; with k = 0 those of the prior."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.special import expit, logsumexp

    w_nD, s2 = np.asarray(prior.tasks_nD, np.float64), prior.sigma**2
    n, d = w_nD.shape
    x_kD, y_k = np.asarray(x, np.float64).reshape(-1, d), np.asarray(y, np.float64).reshape(-1)
    k = len(y_k)
    continuous = np.linalg.solve(x_kD.T @ x_kD + s2 / prior.tau**2 * np.eye(d), x_kD.T @ y_k)
    fit_n = -((y_k - w_nD @ x_kD.T) ** 2).sum(1) / (2 * s2)
    log_pd = float(logsumexp(fit_n) - np.log(n) - k / 2 * np.log(2 * np.pi * s2))
    discrete = np.exp(fit_n - logsumexp(fit_n)) @ w_nD
    log_pc = 0.0
    if k:
        factor = cho_factor(prior.tau**2 * x_kD @ x_kD.T + s2 * np.eye(k), lower=True)
        log_det = 2 * np.log(np.diag(factor[0])).sum()
        log_pc = float(-0.5 * (y_k @ cho_solve(factor, y_k) + log_det + k * np.log(2 * np.pi)))
    # The logit of g; an alpha of 0 or 1 settles it alone.
    with np.errstate(divide="ignore"):
        gate = float(expit(np.log(prior.alpha) - np.log1p(-prior.alpha) + log_pd - log_pc))
    mixed = np.asarray(gate * discrete + (1 - gate) * continuous, np.float64)
    return Posterior(np.asarray(continuous, np.float64), discrete, mixed, gate, log_pd, log_pc)


def estimated_gate(predicted: ArrayLike, continuous: ArrayLike, discrete: ArrayLike) -> float:
    """The g with which a model's predictions [M] come closest to a mix of both predictors' (least squares)."""
    y, c, d = (np.asarray(v, np.float64).ravel() for v in (predicted, continuous, discrete))
    return float((y - c) @ (d - c) / ((d - c) @ (d - c)))


def prompts(
    count: int, pairs: int, prior: Prior, rng: np.random.Generator, *, discrete: bool | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Array, Array, Array]:  # fmt: skip
    """X [count, pairs, d], y [count, pairs] and w [count, d]; None mixes both parts.

    Continuous w are also multiplied by a number uniform in ``scales``, so that scaled labels stay in the prior.
    """
    n, d = prior.tasks_nD.shape
    of_set_B = rng.random(count) < prior.alpha if discrete is None else np.full(count, discrete)
    free_BD = rng.normal(size=(count, d)) * prior.tau * rng.uniform(*scales, (count, 1))
    w_BD = np.where(of_set_B[:, None], prior.tasks_nD[rng.integers(0, n, count)], free_BD)
    x_BKD = rng.normal(size=(count, pairs, d))
    y_BK = np.einsum("bkd,bd->bk", x_BKD, w_BD) + prior.sigma * rng.normal(size=(count, pairs))
    return x_BKD, y_BK, w_BD


class Regressor(torch.nn.Module):
    """A GPT-2 that reads x_1, y_1, x_2, ... as one token each and predicts y_j at the place of x_j.

    Args:
        d: size of x.
        pairs: most pairs of a prompt.
        layers: blocks.
        heads: of attention.
        width: hidden size.
    """

    def __init__(self, d: int, pairs: int, layers: int = 12, heads: int = 8, width: int = 256) -> None:
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        self.d = d
        self.read = torch.nn.Linear(d, width)
        self.body = GPT2Model(
            GPT2Config(
                vocab_size=1,
                n_positions=2 * pairs,
                n_embd=width,
                n_layer=layers,
                n_head=heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
        self.out = torch.nn.Linear(width, 1)

    def forward(self, x_BKD: torch.Tensor, y_BK: torch.Tensor) -> torch.Tensor:
        """Predictions [B, K]; that of y_j has seen x_1 .. x_j and the labels before it."""
        label_BKD = torch.nn.functional.pad(y_BK[..., None], (0, self.d - 1))
        token_BTD = torch.stack([x_BKD, label_BKD], 2).flatten(1, 2)
        hidden_BTH = self.body(inputs_embeds=self.read(token_BTD)).last_hidden_state
        return self.out(hidden_BTH[:, ::2])[..., 0]
