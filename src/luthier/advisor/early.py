"""Which runs of a sweep to stop after a few per cent of the training, from how they begin.

Among runs that train properly, at equal samples seen, a LOWER mean gradient norm G and a HIGHER training loss Lt (less
aggressive fitting) point to BETTER final scores:

    combined   z = -rank(G) + rank(Lt)
    loss       z = rank(Lt)
    gradnorm   z = -rank(G)

over the healthy runs at one probe point, average ranks for ties; with ``within="rate"`` G is ranked only among runs of
equal learning rate, because across rates it also reflects how fast the loss falls. A run is unhealthy when its loss is
not finite, its window's loss lies above its initial loss (mean of the first five steps), or the loss has fallen by less
than ``least_drop`` of the initial one where that is asked for: a rate of nearly 0 has the highest loss of all. Whether
the indicators hold for given runs is measured by :func:`observe`, which hides no wrong sign.

The finding is the paper's; the rule, its gate and its numbers are this library's, for the paper reports correlations.

Source: "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs", 2024, arXiv 2412.13337.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import rankdata

from luthier.core.errors import UserError

Indicator = Literal["combined", "loss", "gradnorm"]
INDICATORS: tuple[Indicator, ...] = ("combined", "loss", "gradnorm")
PROBES = (0.02, 0.05, 0.10)
FIRST_STEPS = 5
LEAST_DROP = 0.02
FEWEST = 2


@dataclass(frozen=True)
class Window:
    """How a run went between two probe points.

    Attributes:
        gradnorm: G, mean gradient norm before clipping, without the first five steps (the first half of them where
            the probe comes before the tenth step) and the warm-up.
        loss: Lt, token-mean training loss of the same steps.
        initial: mean loss of those first steps.
        rate: the run's peak learning rate.
        noise: standard error of ``loss - initial``, from the spread of the steps' losses.
    """

    gradnorm: float
    loss: float
    initial: float
    rate: float = 0.0
    noise: float = 0.0


def window(
    records: Sequence[Mapping[str, Any]], *, since: int, until: int, warmup_steps: int = 0, rate: float = 0.0
) -> Window:
    """The window of a run's ``metrics.jsonl`` records with ``since < step <= until``.

    Args:
        records: one per step (``log_steps: 1``), each with ``step``, ``loss`` and ``grad_norm``; a ``tokens`` count
            weights the loss.
        since: step after which the window begins.
        until: its last step.
        warmup_steps: left out at the start, as the first ones are.
        rate: the run's peak learning rate.

    Raises:
        UserError: no step is left to look at.
    """
    train = [r for r in records if r.get("split", "train") == "train"]
    first = min(FIRST_STEPS, until // 2)
    skip = max(first, warmup_steps, since)
    inside = [r for r in train if skip < r["step"] <= until]
    if not inside:
        raise UserError(
            f"no step between {skip} and {until} is logged, so the run cannot be judged there: probe later, or set "
            "training.log_steps: 1."
        )
    tokens = np.array([float(r.get("tokens", 1.0)) for r in inside])
    losses = np.array([float(r["loss"]) for r in inside])
    begun = np.array([float(r["loss"]) for r in train if r["step"] <= first])
    return Window(
        gradnorm=float(np.mean([float(r["grad_norm"]) for r in inside])),
        loss=float((losses * tokens).sum() / tokens.sum()),
        initial=float(begun.mean()),
        rate=rate,
        noise=float(np.sqrt(losses.var() / losses.size + begun.var() / begun.size)),
    )


def unhealthy(run: Window, *, least_drop: float | None = None, beyond: float = 0.0) -> str:
    """Why a run must be stopped whatever the others do; empty where it need not.

    Args:
        run: its latest window.
        least_drop: share of the initial loss by which the window's must be lower; None before the last probe.
        beyond: standard errors by which the loss must have risen to count as risen.
    """
    if not (math.isfinite(run.loss) and math.isfinite(run.gradnorm) and math.isfinite(run.initial)):
        return "its loss or gradient is not finite"
    if run.loss > run.initial + beyond * run.noise:
        return f"its loss rose from {run.initial:.4g} to {run.loss:.4g}"
    if least_drop is not None and run.loss > (1 - least_drop) * run.initial:
        return f"its loss has fallen by less than {least_drop:.0%} from {run.initial:.4g}"
    return ""


def indicators(runs: Sequence[Window], *, within: Literal["all", "rate"] = "all") -> dict[str, np.ndarray]:
    """Z of every indicator for healthy runs, float64 [runs]; more is better.

    Args:
        runs: the healthy runs at one probe point.
        within: ``rate`` ranks G only among runs of equal learning rate.
    """
    loss_R = rankdata([r.loss for r in runs])
    norm_R = np.array([r.gradnorm for r in runs])
    if within == "all":
        rank_R = rankdata(norm_R)
    else:
        rate_R = np.array([r.rate for r in runs])
        rank_R = np.zeros(len(runs))
        for rate in np.unique(rate_R):
            rank_R[rate_R == rate] = rankdata(norm_R[rate_R == rate])
    return {"combined": loss_R - rank_R, "loss": loss_R, "gradnorm": -rank_R}


def survivors(
    runs: Mapping[str, Window],
    *,
    keep: float = 0.5,
    indicator: Indicator = "combined",
    within: Literal["all", "rate"] = "all",
    last_probe: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """(names that go on, the best first; reason by name of those that stop).

    The top ``ceil(keep * healthy)`` stay, never fewer than two while two are healthy; equal z are taken in the order
    given.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep must be above 0 and at most 1, not {keep}.")
    stopped = {n: why for n, r in runs.items() if (why := unhealthy(r, least_drop=LEAST_DROP if last_probe else None))}
    healthy = [n for n in runs if n not in stopped]
    z_R = indicators([runs[n] for n in healthy], within=within)[indicator] if healthy else np.zeros(0)
    ranked = [healthy[i] for i in np.argsort(-z_R, kind="stable")]
    kept = max(math.ceil(keep * len(healthy) - 1e-9), FEWEST)
    stopped |= {n: f"outside the best {kept} of {len(healthy)} by the {indicator} indicator" for n in ranked[kept:]}
    return ranked[:kept], stopped


def observe(
    runs: Mapping[str, Window],
    final: Mapping[str, float],
    *,
    keep: float = 0.5,
    within: Literal["all", "rate"] = "all",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """What each indicator would have been worth, runs that were all finished.

    Args:
        runs: windows at the probe, by name.
        final: final scores by name; more is better.
        keep: the share that would have been kept.
        within: see :func:`indicators`.
        resamples: of the bootstrap over runs.
        seed: of the bootstrap.

    Returns:
        For each indicator, and for ``-G`` and ``Lt`` themselves: ``spearman`` with ``low`` and ``high`` (95 %),
        ``n``; for the indicators also ``kept`` and ``regret``, the best score of all minus the best of those kept.
    """
    healthy = [n for n, r in runs.items() if not unhealthy(r, least_drop=LEAST_DROP)]
    score_R = np.array([final[n] for n in healthy])
    z = indicators([runs[n] for n in healthy], within=within)
    columns = z | {
        "-G": -np.array([runs[n].gradnorm for n in healthy]),
        "Lt": np.array([runs[n].loss for n in healthy]),
    }
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(healthy), size=(resamples, len(healthy)))
    found: dict[str, dict[str, Any]] = {}
    for name, value_R in columns.items():
        again = np.array([spearman(value_R[i], score_R[i]) for i in drawn])
        again = again[np.isfinite(again)]
        low, high = np.quantile(again, [0.025, 0.975]) if again.size else (math.nan, math.nan)
        correlation = spearman(value_R, score_R)
        found[name] = {"spearman": correlation, "low": float(low), "high": float(high), "n": len(healthy)}
        if name in INDICATORS:
            kept, _ = survivors(runs, keep=keep, indicator=name, within=within, last_probe=True)
            found[name] |= {"kept": kept, "regret": max(final.values()) - max(final[n] for n in kept)}
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where one side is constant."""
    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale > 0 else math.nan


def saved_samples(planned: Mapping[str, int], seen: Mapping[str, int]) -> float:
    """Share of the planned samples that stopping saved."""
    return 1.0 - sum(seen.values()) / sum(planned.values())


def check_comparable(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to rank runs whose loss levels mean different things.

    Args:
        runs: by name, what must be equal: any facts, such as ``model``, ``data``, ``objective``.

    Raises:
        UserError: they differ; it names the fact and the first two runs.
    """
    names = list(runs)
    for name in names[1:]:
        for fact, value in runs[names[0]].items():
            if runs[name].get(fact) != value:
                raise UserError(
                    f"early dynamics cannot rank '{names[0]}' against '{name}': their {fact} differ ({value} and "
                    f"{runs[name].get(fact)}), so losses and gradients have other levels. Rank each group by itself."
                )
