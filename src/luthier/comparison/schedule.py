"""Which trial runs when: those whose cost is reported first and alone, then the others side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from luthier.comparison.pools import Pool
from luthier.comparison.trial import Trial, clean, prepare, reason
from luthier.core.errors import LuthierError
from luthier.models.info import read_json

State = Literal["waiting", "running", "done", "failed"]
Observe = Callable[[Trial, State, str | None], None]
POLL_SECONDS = 0.2
# A further trial starts only where this many times the largest one seen so far is free.
HEADROOM = 1.2


def run_trials(
    trials: Sequence[Trial],
    root: Path,
    pool: Pool,
    *,
    jobs: int,
    threads: int,
    alone: Callable[[Trial], bool],
    observe: Observe = lambda trial, state, reason: None,
    keep_models: bool = False,
) -> dict[str, str]:
    """Run what is not stored yet.

    Args:
        trials: all trials; those with a result are passed over.
        root: the comparison's folder.
        pool: where they run.
        jobs: how many side by side.
        threads: of each trial.
        alone: whether a trial's cost is reported, so that nothing may run beside it.
        observe: told of every change of state.
        keep_models: leave the trained models on disk.

    Returns:
        Key -> reason for every trial that failed. A failed one is tried again by the next call.
    """
    waiting: list[Trial] = []
    seen: set[str] = set()
    for trial in trials:
        if trial.result(root) is not None:
            observe(trial, "done", None)
        elif trial.key not in seen:
            waiting.append(trial)
        seen.add(trial.key)
    waiting.sort(key=lambda t: not alone(t))  # stable: those that must be alone come first
    failed: dict[str, str] = {}
    running: dict[str, tuple[Trial, Any]] = {}
    try:
        while waiting or running:
            while waiting and _may_start(waiting[0], [t for t, _ in running.values()], jobs, alone, trials, root):
                trial = waiting.pop(0)
                by_itself = alone(trial) or jobs == 1
                folder = prepare(trial, root, threads=threads, alone=by_itself)
                running[trial.key] = (trial, pool.start(folder, threads=threads, alone=by_itself))
                observe(trial, "running", None)
            for key, (trial, handle) in list(running.items()):
                status = pool.poll(handle)
                if status is None:
                    continue
                del running[key]
                if status == 0 and trial.result(root) is not None:
                    clean(trial.folder(root), keep_model=keep_models)
                    observe(trial, "done", None)
                else:
                    failed[key] = reason(trial.folder(root))
                    observe(trial, "failed", failed[key])
            time.sleep(POLL_SECONDS)
    finally:
        pool.stop([handle for _, handle in running.values()])
    return failed


def _may_start(
    trial: Trial,
    running: Sequence[Trial],
    jobs: int,
    alone: Callable[[Trial], bool],
    trials: Sequence[Trial],
    root: Path,
) -> bool:
    if not running:
        return True
    if len(running) >= jobs or alone(trial) or any(alone(t) for t in running):
        return False
    results = [t.result(root) for t in trials]
    peaks = [r["cost"].get("peak_memory_bytes") or 0 for r in results if r and "cost" in r]
    return psutil.virtual_memory().available > HEADROOM * max(peaks, default=0)


def run_to(trial: Trial, root: Path, pool: Pool, *, threads: int, until: int | None) -> dict[str, Any]:
    """Run one trial alone, to its end or to a step, from where it was stopped before.

    Args:
        trial: the trial.
        root: the folder of all trials.
        pool: where it runs.
        threads: of its process.
        until: stop after this step, with a checkpoint; None runs it to its end.

    Returns:
        Its result, or ``{"status": "paused", "step": ...}``.

    Raises:
        LuthierError: it failed; with its reason.
    """
    if (known := trial.result(root)) is not None:
        return known
    folder = prepare(trial, root, threads=threads, alone=True, until=until)
    (folder / "paused.json").unlink(missing_ok=True)
    handle = pool.start(folder, threads=threads, alone=True)
    try:
        while (status := pool.poll(handle)) is None:
            time.sleep(POLL_SECONDS)
    except BaseException:
        pool.stop([handle])
        raise
    if status == 0 and (result := trial.result(root)) is not None:
        return result
    if status == 0 and (folder / "paused.json").is_file():
        return read_json(folder / "paused.json")
    raise LuthierError(f"the trial of '{trial.entry}' (seed {trial.seed}) failed: {reason(folder)}")
