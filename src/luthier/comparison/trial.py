"""One trial: a run in a process of its own, stored by the content of everything that decides its numbers.

A trial's folder holds ``recipe.yaml`` and ``spec.json`` (what to do), ``log.txt``, what was measured
(``evaluation.json``, ``rows.safetensors``, ``metrics.jsonl``, ``analysis.json``) and at the end ``result.json``. A trial
whose result is there is not run again; one that was killed goes on from its last checkpoint, or from the start, to the
same numbers.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier import __version__
from luthier.core.errors import LuthierError, UserError
from luthier.core.store import content_hash, write_atomic, write_json

Kind = Literal["run", "base", "probe"]
# What says how a trial is run and not what comes out of it.
_BESIDE = {"output", "training.threads", "training.trackers"}
PROBE_STEPS = 12
KEPT = ("result.json", "evaluation.json", "rows.safetensors", "metrics.jsonl", "analysis.json", "log.txt")


@dataclass(frozen=True)
class Trial:
    """What one process is to do.

    Attributes:
        entry: the name of its entry.
        seed: its seed.
        recipe: the resolved recipe as YAML, its ``output`` left out.
        key: hash of what decides its numbers.
        kind: a run, the measuring of the base, or a probe of a run's cost.
        budget: of a probe: what the run may use, ``{"kind", "amount"}``.
        held_to: what makes it comparable with plain SFT: the same ``rows``, or the same supervised ``tokens``.
    """

    entry: str
    seed: int
    recipe: str
    key: str
    kind: Kind = "run"
    budget: Mapping[str, Any] | None = None
    held_to: str | None = None

    def folder(self, root: Path) -> Path:
        """Where it is stored."""
        return root / "trials" / self.key

    def result(self, root: Path) -> dict[str, Any] | None:
        """Its result, once there is one."""
        file = self.folder(root) / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def trial(
    entry: str,
    plan: Any,
    *,
    kind: Kind = "run",
    budget: Mapping[str, Any] | None = None,
    held_to: str | None = None,
) -> Trial:
    """The trial of a plan.

    Args:
        entry: the name of its entry.
        plan: its plan; the recipe's ``output`` does not matter.
        kind: what is done with it.
        budget: for a probe.
        held_to: see :class:`Trial`.
    """
    from luthier.recipe.load import dump

    recipe = plan.recipe.model_copy(deep=False)
    recipe.output = "run"
    text = dump(recipe)
    own = json.loads(json.dumps(_decisive(recipe), default=str))
    code = [] if kind == "base" else _code(plan)
    key = content_hash(kind, own, budget, _model(recipe.model), *_sources(recipe.data), __version__, *code)
    return Trial(entry, recipe.seed, text, key, kind, budget, held_to)


def _decisive(recipe: Any) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", fallback=str)
    return {
        f"{section}.{key}": value
        for section, part in values.items()
        for key, value in (part.items() if isinstance(part, dict) else [("", part)])
        if section not in _BESIDE and f"{section}.{key}" not in _BESIDE
    }


def _model(model: Any) -> str:
    from luthier.models.info import fingerprint, resolve

    return fingerprint(resolve(model.id, revision=model.revision))


def _sources(data: Any) -> list[str]:
    """Hashes of the files that a recipe's data section names; names of the lab and of the hub stand for themselves."""
    found = []
    for spec in (data.train, data.test, data.select, data.keep, data.template):
        for name in spec if isinstance(spec, list) else [spec]:
            path = Path(str(name)).expanduser()
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            found.append(content_hash(*files) if name and path.exists() else str(name))
    return found


def _code(plan: Any) -> list[Path]:
    """The files of the plan's methods: a user's own may change between two comparisons."""
    files = {inspect.getsourcefile(choice.method.target) for choice in plan.choices()}
    return [Path(file) for file in sorted(f for f in files if f)]


def prepare(trial: Trial, root: Path, *, threads: int, alone: bool, until: int | None = None) -> Path:
    """Write what the trial's process reads, and give its folder."""
    folder = trial.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "recipe.yaml", trial.recipe)
    spec = {"kind": trial.kind, "budget": trial.budget, "threads": threads, "alone": alone, "until": until}
    write_json(folder / "spec.json", spec)
    return folder


def command(folder: Path) -> list[str]:
    """The command line of a trial's process."""
    return [sys.executable, "-m", "luthier.comparison.trial", str(folder)]


def environment(threads: int) -> dict[str, str]:
    """The environment of a trial's process."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def reason(folder: Path) -> str:
    """Why a trial failed: the last error its process wrote, in one line."""
    file = folder / "log.txt"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or ["its process ended without a word"])[-1]


# -- in the trial's own process


def _measured_base(plan: Any, folder: Path) -> dict[str, Any]:
    from luthier.runs.api import open_data
    from luthier.runs.run import Workshop, open_model

    data, _, _ = open_data(plan)
    loaded = open_model(plan, data.labels)
    shop = Workshop(plan, data, loaded, folder)
    shop.measure.kept = {}
    write_json(folder / "evaluation.json", {"after": shop.evaluate(loaded.model)})
    _write_rows(folder, shop.measure.kept)
    _write_texts(folder, data)
    facts = {"labels": list(data.labels), "task": plan.task, "keep": [source.name for source in data.keep]}
    write_json(folder / "data.json", facts)
    return {"cost": {}}


def _write_rows(folder: Path, kept: Mapping[str, Any]) -> None:
    """Every measured position, by source."""
    from safetensors.numpy import save

    tensors = {f"{source}/{name}": array for source, k in kept.items() for name, array in k.arrays().items()}
    write_atomic(folder / "rows.safetensors", save(tensors))


def _write_texts(folder: Path, data: Any) -> None:
    """Prompts and references of the target's rows, for the page."""
    if data.test is None:
        return
    rows = [data.test.prepared.canonical(i) for i in range(len(data.test.prepared))]
    texts = [
        {
            "row": row["row"],
            "prompt": row.get("prompt") or row.get("messages") or row.get("text") or "",
            "reference": (json.loads(row.get("extra") or "{}")).get("answer") or row.get("completion") or "",
        }
        for row in rows
    ]
    write_json(folder / "texts.json", texts)


def _run(plan: Any, folder: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    from luthier.engine.loop import Interrupted
    from luthier.runs.instruments import Instruments
    from luthier.runs.run import execute

    out, instruments = folder / "run", Instruments(folder=folder)
    plan.recipe.output = str(out)
    until = spec.get("until")
    try:
        run = execute(
            plan, resume=(out / "recipe.yaml").is_file(), quiet=True, until=until, instruments=instruments
        )
    except Interrupted:
        if until is None:
            raise
        return {"status": "paused", "step": instruments.counts[-1][1].session.step}
    for name in ("evaluation.json", "analysis.json"):
        if (out / name).is_file():
            os.replace(out / name, folder / name)
    shutil.copyfile(out / "metrics.jsonl", folder / "metrics.jsonl")
    _write_rows(folder, instruments.kept)
    totals = run.metrics["training"]
    trained, size = totals.get("trainable_parameters"), totals.get("parameters")
    cost = {
        "seconds": totals.get("seconds"),
        "flops": instruments.flops(),
        "peak_memory_bytes": totals.get("peak_memory_bytes"),
        "trainable_share": trained / size if trained and size else None,
        "artefact_bytes": sum(f.stat().st_size for f in (out / "model").rglob("*.safetensors")),
        "supervised_tokens": totals.get("supervised"),
        "tokens": totals.get("tokens"),
        "rows": totals.get("rows"),
        "steps": totals.get("steps"),
    }
    return {"cost": cost}


def _probe(plan: Any, folder: Path, budget: Mapping[str, Any]) -> dict[str, Any]:
    """How many steps the budget pays for, from a few steps of the run in a folder of its own that is thrown away."""
    from luthier.engine.loop import Interrupted
    from luthier.runs.instruments import Instruments
    from luthier.runs.run import execute

    instruments = Instruments()
    out = folder / "probe"
    shutil.rmtree(out, ignore_errors=True)
    plan.recipe.output = str(out)
    plan.recipe.training.log_steps = 1
    try:
        execute(plan, quiet=True, until=PROBE_STEPS, instruments=instruments)
    except Interrupted:
        pass
    finally:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        shutil.rmtree(out, ignore_errors=True)
    count, trainer = instruments.counts[-1]
    done = trainer.session.step
    seconds = sorted(r["tokens"] / r["tokens_per_second"] for r in records if r.get("tokens_per_second"))
    used = {
        "tokens": trainer.seen["supervised"] / done,
        "flops": count.estimate(1),
        "seconds": seconds[len(seconds) // 2] if seconds else trainer.seen["seconds"] / done,
    }[budget["kind"]]
    return {"steps": max(1, round(budget["amount"] / used)), "per_step": used, "probed": done}


def main(folder: Path) -> int:
    """Run the trial in ``folder``; its exit status."""
    from luthier.recipe.load import load
    from luthier.recipe.plan import plan as plan_of
    from luthier.runs import setup

    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    try:
        plan = plan_of(load(folder / "recipe.yaml", [f"training.threads={spec['threads']}"]))
        setup.settings(plan)
        if spec["kind"] == "base":
            result = _measured_base(plan, folder)
        elif spec["kind"] == "probe":
            result = _probe(plan, folder, spec["budget"])
        else:
            result = _run(plan, folder, spec)
    except LuthierError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_status
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    name = "paused.json" if result.get("status") == "paused" else "result.json"
    write_json(folder / name, {"status": "done", "alone": spec["alone"], **result})
    return 0


def clean(folder: Path, *, keep_model: bool) -> None:
    """Delete of a finished trial what only going on needs: checkpoints, and the model unless it is kept."""
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    if not keep_model:
        shutil.rmtree(folder / "run" / "model", ignore_errors=True)


def check_budget(text: str | None) -> dict[str, Any]:
    """``tokens=..``, ``flops=..`` or ``seconds=..`` as ``{"kind", "amount"}``; without one, the recipe's own rows.

    Raises:
        UserError: another word, or no positive number.
    """
    if text is None:
        return {"kind": "rows", "amount": None}
    kind, _, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    if kind not in ("tokens", "flops", "seconds") or not 0 < value < float("inf"):
        raise UserError(
            f"--budget: '{text}' must be tokens=N (supervised tokens), flops=N or seconds=N with a positive number."
        )
    return {"kind": kind, "amount": value}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
