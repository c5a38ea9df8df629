"""The evaluation suites: likelihood over batches, and generation judged by a verifier.

Both stream: the likelihood suite keeps sums only, the generation suite keeps one short record per item, so that two
models can be compared item by item.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Completion, Outputs, Reward
from luthier.core.registry import NUMBER_TASKS, TOKEN_TASKS
from luthier.evaluation.accumulators import (
    Accumulator,
    Calibration,
    ClassF1,
    EntityF1,
    Kept,
    MeanOf,
    Means,
    Metric,
    Observed,
    as_metric,
    is_entity_scheme,
)
from luthier.evaluation.regression import agreement
from luthier.functional.statistics import mean, paired_bootstrap, proportion, score_mean

STATISTICS = ("logp", "top1", "top1_logp", "collision")
"""What the likelihood suite reads from the head; ``Needs.statistics`` of an evaluation forward."""
CALIBRATION = ("ece_equal_mass", "ece_equal_width", "brier", "nll")
"""The metrics of the likelihood suite that describe calibration."""


def _observe(out: Outputs, batch: Batch, first: int) -> Observed:
    """The statistics of the positions that count (weight above zero), moved to numpy."""

    def numpy(value: torch.Tensor) -> np.ndarray:
        return value.detach().cpu().numpy()

    kept = numpy(batch.weight_N) > 0
    logp_N = numpy(out.logp_N).astype(np.float64)[kept]
    sequence_N = numpy(batch.sequence_N)[kept]
    if not np.isfinite(logp_N).all():
        example = int(sequence_N[np.flatnonzero(~np.isfinite(logp_N))[0]])
        raise LuthierError(
            f"the model gives a log-probability that is not finite on row {int(batch.row_B[example])} of the prepared "
            "data. Its weights or this row make it overflow: evaluate in float32 (training.precision: fp32), or go "
            "back to an earlier checkpoint."
        )
    return Observed(
        logp_N=logp_N,
        top1_N=numpy(out.top1_N)[kept],
        top1_logp_N=numpy(out.top1_logp_N).astype(np.float64)[kept],
        collision_N=numpy(out.collision_N).astype(np.float64)[kept],
        target_N=numpy(batch.target_N)[kept],
        sequence_N=sequence_N,
        examples=batch.examples,
        first=first,
    )


def _exp(value: float) -> float:
    return math.inf if value > 709 else math.exp(value)


def accumulators(task: str, labels: Sequence[str] | None, *, with_calibration: bool = True) -> list[Accumulator]:
    """The accumulators of a task.

    Raises:
        UserError: a classification task without label names.
    """
    accuracy = "token_accuracy" if task in TOKEN_TASKS else "accuracy"
    means = {
        "loss": MeanOf(lambda o: -o.logp_N, "nats", "lower"),
        "perplexity": MeanOf(lambda o: -o.logp_N, "perplexity", "lower", report=_exp),
        accuracy: MeanOf(lambda o: o.correct_N, "share", "higher", (0.0, 1.0)),
        "mean_probability": MeanOf(lambda o: np.exp(o.logp_N), "share", "higher", (0.0, 1.0)),
    }
    chosen: list[Accumulator] = []
    if task not in TOKEN_TASKS:
        del means["perplexity"]
        if not labels:
            raise UserError(f"evaluating {task} needs the names of the labels, and there are none.")
        chosen.append(ClassF1(labels))
        if task == "token-classification" and is_entity_scheme(labels):
            chosen.append(EntityF1(labels))
    if with_calibration:
        chosen.append(Calibration())
    return [Means(means), *chosen]


def likelihood(
    batches: Iterable[Batch],
    forward: Callable[[Batch], Outputs],
    *,
    task: str,
    labels: Sequence[str] | None = None,
    confidence: float = 0.95,
    calibration: bool = True,
    kept: Kept | None = None,
) -> dict[str, Metric]:
    """Loss, accuracy, F1 and calibration of a model over batches.

    Args:
        batches: collated batches; each example stands in one batch, whole.
        forward: the model up to its outputs; :data:`STATISTICS` are read.
        task: ``causal-lm``, ``sequence-classification``, ``token-classification`` or ``image-classification``.
        labels: names of the classes in the order of their indices, for classification.
        confidence: of the intervals.
        calibration: also give the metrics of :data:`CALIBRATION`.
        kept: takes every position, for comparisons row by row.

    Returns:
        ``{metric: {value, n, low, high, unit, direction}}``.

    Raises:
        UserError: there is nothing to evaluate, or label names are missing.
        LuthierError: a log-probability is not finite.
    """
    if task in NUMBER_TASKS:
        if kept is not None:
            raise UserError(f"models are compared by tokens or classes, and the targets of {task} are numbers.")
        return agreement(batches, forward, confidence=confidence)
    chosen = accumulators(task, labels, with_calibration=calibration) + ([] if kept is None else [kept])
    examples = positions = 0
    with torch.no_grad():
        for batch in batches:
            seen = _observe(forward(batch), batch, examples)
            examples += seen.examples
            positions += seen.target_N.size
            for accumulator in chosen:
                accumulator.add(seen)
    if not positions:
        raise UserError("there is no supervised position to evaluate: the data is empty or nothing in it is a target.")
    found: dict[str, Metric] = {}
    for accumulator in chosen:
        found |= accumulator.metrics(confidence)
    return found


def generation(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Sequence[int]],
    generate: Callable[[list[list[int]]], list[Completion]],
    verifier: Reward,
    *,
    confidence: float = 0.95,
    name: str = "score",
    ctx: Any = None,
) -> dict[str, Any]:
    """Let the model answer and judge the answers.

    Args:
        rows: canonical rows, with what the verifier reads.
        prompts: token ids of each row's prompt.
        generate: the decoder over the model under test.
        verifier: a reward; None for an answer it cannot judge.
        confidence: of the intervals.
        name: the metric's name, such as ``exact_match``.
        ctx: handed to the verifier.

    Returns:
        ``{"metrics": {metric: {...}}, "items": [{row, completion, score, finished, tokens}]}``, items in the order of
        ``rows``. Metrics: the verifier's mean (over the answers it judged), ``judged``, ``finished`` (the share that
        ended by itself) and ``tokens`` (mean length).
    """
    if not rows:
        raise UserError("there is no row to generate for: the evaluation data is empty.")
    completions = generate([list(p) for p in prompts])
    if len(completions) != len(rows):
        raise LuthierError(f"the decoder gave {len(completions)} completions for {len(rows)} prompts.")
    scores = verifier(rows, [c.text for c in completions], ctx)
    if len(scores) != len(rows):
        raise LuthierError(f"the verifier gave {len(scores)} scores for {len(rows)} completions.")
    items = [
        {
            "row": row.get("row", index),
            "completion": completion.text,
            "score": score,
            "finished": completion.finished,
            "tokens": len(completion.token_ids),
        }
        for index, (row, completion, score) in enumerate(zip(rows, completions, scores, strict=True))
    ]
    judged = [s for s in scores if s is not None]
    finished = sum(c.finished for c in completions)
    return {
        "metrics": {
            name: as_metric(score_mean(judged, confidence), "share", "higher"),
            "judged": as_metric(proportion(len(judged), len(rows), confidence), "share", "higher"),
            "finished": as_metric(proportion(finished, len(rows), confidence), "share", "higher"),
            "tokens": as_metric(mean([i["tokens"] for i in items], confidence), "tokens", "lower"),
        },
        "items": items,
    }


def compare_items(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> Metric:
    """The paired difference ``after - before`` of two lists of items over the same rows, judged on both sides.

    Returns:
        A metric with one more key, ``p_value`` (two-sided, paired bootstrap).

    Raises:
        LuthierError: the items are not of the same rows in the same order.
    """
    if [i["row"] for i in before] != [i["row"] for i in after]:
        raise LuthierError("a paired comparison needs the same rows in the same order on both sides.")
    pairs = [
        (b["score"], a["score"])
        for b, a in zip(before, after, strict=True)
        if b["score"] is not None and a["score"] is not None
    ]
    old, new = [p[0] for p in pairs], [p[1] for p in pairs]
    found = paired_bootstrap(old, new, confidence=confidence, samples=samples, seed=seed)
    metric = as_metric(found.estimate, "difference", "higher")
    return {**metric, "p_value": None if math.isnan(found.p_value) else found.p_value}
