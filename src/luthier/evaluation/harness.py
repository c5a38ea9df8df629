"""lm-evaluation-harness over a model in memory: its public benchmarks, reported in this library's form.

Needs the extra ``harness``. The tasks download their data where it is not cached. Tasks that run code the model has
written are left to lm-eval's own refusal: they need its explicit consent, which is not given here.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError, did_you_mean, missing_extra
from luthier.evaluation.accumulators import Metric, as_metric
from luthier.functional.statistics import Estimate, normal_quantile, proportion

# Metrics of lm-eval that are means of zeros and ones.
_SHARES = ("acc", "acc_norm", "exact_match")


def require() -> None:
    """Refuse early where lm-evaluation-harness is not installed.

    Raises:
        UserError: with the install command.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "evaluate --harness", "luthier[harness]")


def as_metrics(results: Mapping[str, Any], confidence: float) -> dict[str, dict[str, Metric]]:
    """The results of ``lm_eval.simple_evaluate`` as ``{task: {metric: {value, n, low, high, unit, direction}}}``.

    A metric is named as there, with its filter in brackets where that is not the default (``exact_match
    (strict-match)``). Intervals are Wilson's for shares of right answers, and otherwise normal ones from the standard
    errors it gives.
    """
    z = normal_quantile(confidence)
    found: dict[str, dict[str, Metric]] = {}
    for task, values in results["results"].items():
        higher = results.get("higher_is_better", {}).get(task, {})
        n = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if name in _SHARES and n:
                estimate = proportion(value * n, n, confidence)
            else:
                error = values.get(f"{name}_stderr,{kind}")
                half = z * error if isinstance(error, int | float) else math.nan
                estimate = Estimate(float(value), n, value - half, value + half)
            shown = name if kind == "none" else f"{name} ({kind})"
            unit = "share" if name in _SHARES else name
            metric = as_metric(estimate, unit, "lower" if higher.get(name) is False else "higher")
            found.setdefault(task, {})[shown] = metric
    return found


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    confidence: float = 0.95,
    include: Path | None = None,
) -> dict[str, dict[str, Metric]]:
    """Run tasks of lm-evaluation-harness.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: names of tasks, groups or tags, ``*`` matching any part of a name.
        batch_size: rows at a time.
        limit: examples of each task; all by default.
        confidence: of the intervals.
        include: a folder with further task files.

    Raises:
        UserError: lm-eval is not installed, or it has no such task.
    """
    require()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if not manager.match_tasks([task]):
            raise UserError(
                f"lm-evaluation-harness has no task '{task}'.{did_you_mean(task, manager.all_tasks)} "
                "List them with: lm-eval ls tasks",
                where="--harness",
            )
    was_training = model.training
    model.eval()
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            limit=limit,
            log_samples=False,
        )
    finally:
        model.train(was_training)
    return as_metrics(results, confidence)
