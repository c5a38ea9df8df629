"""``luthier compare``: the trials of all entries, run and put side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.comparison import entries as reading
from luthier.comparison.collect import Line, collect
from luthier.comparison.entries import BASE, SFT, Entry
from luthier.comparison.pools import LocalPool, Pool, RayPool, cores
from luthier.comparison.schedule import Observe, run_trials
from luthier.comparison.trial import Trial, check_budget, trial
from luthier.core.errors import LuthierError, UserError
from luthier.core.registry import TOKEN_TASKS
from luthier.core.store import write_atomic, write_json
from luthier.recipe.load import dump, load
from luthier.recipe.plan import Plan, plan

# A method whose supervised tokens are nearer to plain SFT's than this is not trained a second time with equal tokens.
SAME_TOKENS = 0.02
DRIFT = "drift"


class Comparison:
    """A comparison that is set up and not yet run.

    Args:
        recipe: a recipe file, the folder of a run, or a mapping.
        methods: entries, see :mod:`luthier.comparison.entries`.
        seeds: how many seeds; they count up from the recipe's.
        budget: ``tokens=..``, ``flops=..`` or ``seconds=..`` for every trial, or None for the recipe's own epochs.
        output: the comparison's folder; by default ``runs/compare-<name of the recipe>``.
        overrides: changes to the recipe.
        jobs: trials side by side.
        ray: address of a Ray cluster to run them on.
        keep_models: leave the trained models on disk.
        sections: recipe sections as keywords.

    Raises:
        UserError: anything wrong with recipe, entries or budget, before a trial is started.
    """

    def __init__(
        self,
        recipe: Any = None,
        /,
        *,
        methods: str | Sequence[str] = (),
        seeds: int = 3,
        budget: str | None = None,
        output: str | Path | None = None,
        overrides: Sequence[str] = (),
        jobs: int = 1,
        ray: str | None = None,
        keep_models: bool = False,
        **sections: Any,
    ) -> None:
        if seeds < 1 or jobs < 1:
            raise UserError("--seeds and --jobs must be 1 or more.")
        self.entries = reading.parse([methods] if isinstance(methods, str) else list(methods))
        self.budget = check_budget(budget)
        source = (
            {**(recipe if isinstance(recipe, Mapping) else {}), **sections} if recipe is None or sections else recipe
        )
        if isinstance(source, str | Path) and (Path(source) / "recipe.yaml").is_file():
            source = Path(source) / "recipe.yaml"
        self.root = Path(output) if output else None
        base = load(source, list(overrides))
        self.root = self.root or Path(f"{base.output.rstrip('/')}-compare")
        self.recipe = load(_on_disk(base, self.root))
        self.seeds = [self.recipe.seed + k for k in range(seeds)]
        self.jobs, self.ray, self.keep_models = jobs, ray, keep_models
        self.threads = self.recipe.training.threads or max(1, cores() // jobs)
        self.confidence = self.recipe.evaluation.confidence
        common = json.loads(json.dumps(_mapping(self.recipe)))
        self.plain = Entry(SFT)
        # Everything is planned before anything runs: what cannot work is said at once.
        self.plans = {
            (entry.name, seed): self._plan(entry, common, seed)
            for entry in (self.plain, *self.entries)
            for seed in self.seeds
        }
        self.sections = {entry.name: _own(entry.sections(common), entry) for entry in (self.plain, *self.entries)}

    def _plan(self, entry: Entry, common: Mapping[str, Any], seed: int, max_steps: int | None = None) -> Plan:
        sections = entry.sections(common)
        if sections["data"].get("test") is not None:
            sections["analysis"] = [DRIFT]
        more = [f"seed={seed}", "evaluation.before=false"]
        if max_steps is not None:
            more += [f"training.max_steps={max_steps}", "training.epochs=1000000"]
        try:
            return plan(load(sections, [*entry.overrides, *more]))
        except UserError as error:
            raise UserError(f"--methods: '{entry.name}': {error}") from error

    def recipe_of(self, entry: Entry) -> Any:
        """The recipe of an entry, as ``luthier train`` would run it."""
        return load(entry.sections(self._common()), list(entry.overrides))

    # -- trials

    def base_trials(self) -> list[Trial]:
        """The base is measured once; a classifier's once per seed, because its head is drawn."""
        task = self.plans[SFT, self.seeds[0]].task
        seeds = self.seeds[:1] if task in TOKEN_TASKS else self.seeds
        return [trial(BASE, self.plans[SFT, seed], kind="base") for seed in seeds]

    def run(
        self,
        observe: Observe = lambda trial, state, reason: None,
        *,
        update: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Run what is not stored yet and write ``comparison.json`` and ``comparison.html``.

        Args:
            observe: told of every change of a trial's state.
            update: given the comparison as it stands, whenever a trial ended.

        Returns:
            The comparison, see ``comparison.json``.

        Raises:
            LuthierError: the base or plain SFT could not be measured; methods that fail are reported in their line.
        """
        assert self.root is not None
        root = self.root
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(root / "recipe.yaml", dump(self.recipe))
        pool: Pool = RayPool(self.ray) if self.ray else LocalPool()
        failed: dict[str, str] = {}
        lines: list[Line] = []

        def watching(trial: Trial, state: Any, reason: str | None) -> None:
            observe(trial, state, reason)
            if state == "failed":
                failed[trial.key] = reason or ""
            if update is not None and state in ("done", "failed") and lines and lines[0].trials[0].result(root):
                update(self._collect(lines, failed))

        def run(trials: Sequence[Trial]) -> None:
            run_trials(
                trials,
                root,
                pool,
                jobs=self.jobs,
                threads=self.threads,
                alone=lambda t: t.kind == "probe" or (t.kind == "run" and t.seed == self.seeds[0]),
                observe=watching,
                keep_models=self.keep_models,
            )

        bases = self.base_trials()
        lines.append(Line(Entry(BASE), "base", bases, failed=failed))
        run(bases)
        self._must(bases, failed, "the base could not be measured")
        steps = self._steps(run, failed)
        for entry in (self.plain, *self.entries):
            trials = [
                trial(entry.name, self._with_steps(entry, seed, steps.get(entry.name)), held_to="rows")
                for seed in self.seeds
            ]
            kind = "sft" if entry.name == SFT else "method"
            held_to = "rows" if entry.changes_rows else None
            lines.append(Line(entry, kind, trials, held_to, self.sections[entry.name], failed))
        run([t for line in lines[1:] for t in line.trials])
        self._must(lines[1].trials, failed, "plain SFT failed")
        lines += self._equal_tokens(lines, failed)
        run([t for line in lines for t in line.trials])
        made = self._collect(lines, failed)
        write_json(root / "comparison.json", made)
        from luthier.comparison.page import write_page

        write_page(made, root / "comparison.html")
        return made

    def _must(self, trials: Sequence[Trial], failed: Mapping[str, str], what: str) -> None:
        assert self.root is not None
        if all(t.result(self.root) is None for t in trials):
            first = trials[0]
            raise LuthierError(
                f"{what}: {failed.get(first.key, 'no result')} (its log: {first.folder(self.root) / 'log.txt'})"
            )

    def _common(self) -> dict[str, Any]:
        return json.loads(json.dumps(_mapping(self.recipe)))

    def _with_steps(self, entry: Entry, seed: int, steps: int | None) -> Plan:
        return self.plans[entry.name, seed] if steps is None else self._plan(entry, self._common(), seed, steps)

    def _steps(self, run: Callable[[Sequence[Trial]], None], failed: Mapping[str, str]) -> dict[str, int]:
        """Steps of every entry under the budget, measured by a short probe of each; empty without a budget."""
        assert self.root is not None
        if self.budget["kind"] == "rows":
            return {}
        # The length of the schedule does not matter to a probe, but it must be longer than the probe is.
        probes = {
            entry.name: trial(
                entry.name,
                self._plan(entry, self._common(), self.seeds[0], 1_000_000),
                kind="probe",
                budget=self.budget,
            )
            for entry in (self.plain, *self.entries)
        }
        run(list(probes.values()))
        results = {name: probe.result(self.root) for name, probe in probes.items()}
        self._must([probes[SFT]], failed, "plain SFT failed")
        # A method whose probe failed is tried with plain SFT's steps, so that its line says why it fails.
        plain = int((results[SFT] or {})["steps"])
        return {name: int(found["steps"]) if found else plain for name, found in results.items()}

    def _equal_tokens(self, lines: Sequence[Line], failed: Mapping[str, str]) -> list[Line]:
        """Lines beside those that train on other tokens than plain SFT: the same methods at equal supervised tokens."""
        assert self.root is not None
        root, found = self.root, []
        plain = {t.seed: r["cost"]["supervised_tokens"] for t in lines[1].trials if (r := t.result(root))}
        for line in lines[2:]:
            if line.held_to != "rows" or self.budget["kind"] == "tokens":
                continue
            trials = []
            for own in line.trials:
                result = own.result(root)
                tokens, steps = ((result or {}).get("cost", {}).get(k) for k in ("supervised_tokens", "steps"))
                if not tokens or not steps or own.seed not in plain:
                    continue
                factor = plain[own.seed] / tokens
                if abs(math.log(factor)) > SAME_TOKENS:
                    wanted = max(1, round(steps * factor))
                    planned = self._plan(line.entry, self._common(), own.seed, wanted)
                    trials.append(trial(line.entry.name, planned, held_to="tokens"))
            if trials:
                found.append(Line(line.entry, "method", trials, "tokens", line.sections, failed))
        return found

    def _collect(self, lines: Sequence[Line], failed: Mapping[str, str]) -> dict[str, Any]:
        assert self.root is not None
        facts = json.loads((lines[0].trials[0].folder(self.root) / "data.json").read_text(encoding="utf-8"))
        return collect(
            lines,
            self.root,
            title=f"{Path(self.recipe.model.id).name} on {_short(self.recipe.data.train)}",
            recipe=dump(self.recipe),
            model=self.recipe.model.id,
            task=facts["task"],
            labels=facts["labels"],
            keep=facts["keep"],
            seeds=self.seeds,
            budget=self.budget,
            jobs=self.jobs,
            confidence=self.confidence,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        notes = []
        if len(self.seeds) == 1:
            notes.append(
                "With one seed the intervals are of the items alone: what another seed would give is not known."
            )
        if not self.keep_models:
            notes.append("The trained models were deleted after they had been measured (--keep-models keeps them).")
        return notes


def compare(recipe: Any = None, /, *, quiet: bool = False, **options: Any) -> dict[str, Any]:
    """Train methods side by side and say what each gains, forgets, calibrates and costs.

    Args:
        recipe: a recipe file, the folder of a run, or a mapping; or leave it out and give sections.
        quiet: show no progress.
        options: those of :class:`Comparison` (``methods``, ``seeds``, ``budget``, ``output``, ``jobs``, ``ray``,
            ``keep_models``, ``overrides``) and recipe sections as keywords.

    Returns:
        The comparison as in ``comparison.json``, with ``folder`` added.

    Example::

        found = luthier.compare(model="lab:nano", data={"train": "lab:strings", "test": "lab:strings"},
                                methods="half-ft,anchored-sft+lora", seeds=3)
        print(found["findings"])
    """
    from luthier.comparison.table import Watch

    comparison = Comparison(recipe, **options)
    with Watch(comparison, quiet=quiet) as watch:
        made = comparison.run(watch.observe, update=watch.update if watch.live else None)
    return {**made, "folder": str(comparison.root)}


def _mapping(recipe: Any) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", exclude={"data": {"train", "test", "select", "keep"}})
    values["data"] |= {key: getattr(recipe.data, key) for key in ("train", "test", "select", "keep")}
    return values


def _own(sections: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Of an entry's recipe, what makes it: its methods and changes."""
    keys = ("procedure", "objective", "transforms", "selection", "parameters", "weights", "decoding")
    plain = {"procedure": SFT, "objective": [SFT], "transforms": [], "selection": None, "weights": []}
    own = {key: sections[key] for key in keys if sections.get(key) != plain.get(key)}
    if stages := sections["data"].get("stages"):
        own["data.stages"] = stages
    return own | dict(text.split("=", 1) for text in entry.overrides)


def _on_disk(recipe: Any, root: Path) -> Any:
    """The recipe with rows that were given in memory written to files, for trials are processes of their own."""
    for key in ("train", "test", "select"):
        rows = getattr(recipe.data, key)
        if rows is not None and not isinstance(rows, str) and not (isinstance(rows, list) and isinstance(rows[0], str)):
            file = root / "data" / f"{key}.jsonl"
            write_atomic(file, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
            setattr(recipe.data, key, str(file))
    return recipe


def _short(spec: Any) -> str:
    from luthier.runs.setup import source_name

    return source_name(spec[0] if isinstance(spec, list) else spec)
