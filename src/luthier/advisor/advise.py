"""``luthier advise``: measure, propose, race, compare, recommend.

Everything lies in one folder and is kept: ``findings.json`` (measured once), ``race.json`` and ``trials/`` (nothing is
trained twice), ``comparison.json`` and its page, ``advice.json``, ``advice.html`` and ``recommended.yaml``. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier.advisor.budget import seconds_of
from luthier.advisor.findings import Findings
from luthier.advisor.hold_out import hold_out
from luthier.advisor.measure import ANSWERED_ROWS, SAMPLE_ROWS, measure
from luthier.advisor.page import FILE, write_page
from luthier.advisor.race import SFT, Outcome, Race, Standing, seeds_for
from luthier.advisor.recommend import written
from luthier.advisor.rules import Advice, Proposal, Rule, advise_by_rules
from luthier.advisor.trials import TrialRunner, shortened
from luthier.advisor.verdict import BASE, Verdict, conclude, unraced
from luthier.core.errors import UserError
from luthier.core.store import write_atomic, write_json

ASKED = Rule("asked for", lambda findings: True, (), "You asked for it.", "you")
METHOD_KEYS = ("procedure", "objective", "transforms", "selection", "parameters", "weights", "data")
Say = Callable[[str], None]


class Advisor:
    """An advice that is set up and not yet given.

    Args:
        model: a model folder, a hub id, or ``lab:<name>``.
        data: training rows.
        test: held-out rows; by default a file beside the data, else a part of the rows.
        budget: seconds, or a text such as ``20m``, for all of it.
        methods: entries to race besides those that the rules propose.
        seeds: at most so many in the final comparison.
        race: whether to train anything.
        output: the advice's folder.
        overrides: ``key.path=value`` changes to the recipe that is guessed for model and data.
        sample_rows: rows that the base scores.
        answered_rows: rows that it answers.
        say: told what is being done.
        watch: told of every change in the race.

    Raises:
        UserError: anything wrong with the inputs, before anything is measured.
    """

    def __init__(
        self,
        model: str,
        data: str,
        *,
        test: str | None = None,
        budget: str | float = "20m",
        methods: str | Sequence[str] = (),
        seeds: int = 3,
        race: bool = True,
        output: str | Path | None = None,
        overrides: Sequence[str] = (),
        sample_rows: int = SAMPLE_ROWS,
        answered_rows: int = ANSWERED_ROWS,
        say: Say = lambda text: None,
        watch: Callable[[Standing], None] = lambda standing: None,
    ) -> None:
        from luthier.comparison.entries import parse
        from luthier.recipe.guess import guess
        from luthier.recipe.load import load
        from luthier.recipe.plan import plan
        from luthier.recipe.source import parse as parse_recipe

        self.budget = seconds_of(budget)
        if seeds < 1 or sample_rows < 1 or answered_rows < 1:
            raise UserError("--seeds, --sample and --answers must be 1 or more.")
        self.asked = [e.name for e in parse([methods] if isinstance(methods, str) else list(methods))]
        guessed = guess(model, data, test=test)
        self.remarks = guessed.remarks
        # Too long a row is something to report here, not a reason to stop.
        self.recipe = load(load(parse_recipe(guessed.text, "the recipe")[0]), ["data.truncation=drop", *overrides])
        self.plan = plan(self.recipe)
        name = self.recipe.output.rstrip("/").rpartition("/")[2].removesuffix("-sft")
        self.folder = Path(output) if output else Path("runs") / f"advice-{name}"
        self.seeds, self.race, self.say, self.watch = seeds, race, say, watch
        self.sizes = {"sample_rows": sample_rows, "answered_rows": answered_rows}
        self._check_folder()

    def _check_folder(self) -> None:
        """Take a new folder, or the one of the same question."""
        from luthier.recipe.load import dump

        asked = {
            "recipe": dump(self.recipe),
            "budget": self.budget,
            "methods": self.asked,
            "seeds": self.seeds,
            **self.sizes,
        }
        file = self.folder / "asked.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            other = [key for key, value in asked.items() if before.get(key) != value]
            if other:
                raise UserError(
                    f"{self.folder} holds an advice on another question ({', '.join(other)} differ). Choose another "
                    "place with --output, or delete the folder."
                )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(
                f"output: '{self.folder}' is there already and holds no advice. Choose another with --output."
            )
        write_json(file, asked)

    # -- the steps

    def run(self) -> dict[str, Any]:
        """Give the advice.

        Returns:
            What ``advice.json`` holds, with ``folder`` added.

        Raises:
            UserError: the rows cannot be read, or the budget does not pay for a race.
            LuthierError: the base or plain SFT could not be trained or measured.
        """
        findings, seconds = self._findings()
        advice = self._propose(findings)
        outcome, comparison = None, None
        if self.race:
            outcome, comparison, spent = self._race(advice, self.budget - seconds)
            seconds += spent
        first = advice.candidates[0].entry if advice.candidates else None
        verdict = unraced(first, advice.remarks) if comparison is None else conclude(comparison, advice.remarks)
        return self._write(findings, advice, outcome, comparison, verdict, seconds)

    def _findings(self) -> tuple[Findings, float]:
        file = self.folder / "findings.json"
        if not file.is_file():
            started = time.perf_counter()
            found = measure(self.plan, **self.sizes, say=self.say)
            write_json(
                file, {"seconds": time.perf_counter() - started, "task": self.plan.task, "findings": found.to_list()}
            )
        kept = json.loads(file.read_text(encoding="utf-8"))
        self.plan.settle_task(kept["task"])
        return Findings.from_list(kept["findings"]), kept["seconds"]

    def _propose(self, findings: Findings) -> Advice:
        training = self.recipe.training
        found = advise_by_rules(
            findings, task=self.plan.task, learning_rate=training.learning_rate, batch_rows=training.batch_rows or 16
        )
        asked = tuple(Proposal(entry, ASKED) for entry in self.asked)
        known = set(self.asked)
        return Advice((*asked, *(c for c in found.candidates if c.entry not in known)), found.remarks, found.left_out)

    def _race(self, advice: Advice, budget: float) -> tuple[Outcome, dict[str, Any], float]:
        """(how the race went, the final comparison, seconds of both)."""
        from luthier.comparison.run import Comparison

        recipe = self._race_recipe()
        runner = TrialRunner(recipe, self.folder)
        entries = []
        for candidate in advice.candidates:
            try:
                runner.plan(candidate.entry, 1.0)
            except UserError as error:
                advice.left_out[candidate.entry] = str(error)
            else:
                entries.append(candidate.entry)
        self.say(f"racing plain SFT and {len(entries)} candidates")
        outcome = Race(runner, self.folder / "race.json", budget, observe=self.watch).run(entries)
        finalists = outcome.finalists
        # The base is measured as well, which takes about as long as a trial of this size.
        left = budget - outcome.seconds - outcome.trial_seconds
        seeds = seeds_for(left, 1 + len(finalists), outcome.trial_seconds, self.seeds)
        self.say(f"comparing plain SFT with {', '.join(finalists) or 'the base'} over {seeds} seeds")
        started = time.perf_counter()
        final = Comparison(shortened(recipe, outcome.length), methods=finalists, seeds=seeds, output=self.folder)
        comparison = final.run()
        # Kept, so that a second look at a finished advice does not call its second quick reading the time it took.
        file = self.folder / "final.json"
        if not file.is_file():
            write_json(file, {"seconds": time.perf_counter() - started})
        runner.finish()
        return outcome, comparison, outcome.seconds + json.loads(file.read_text(encoding="utf-8"))["seconds"]

    def _race_recipe(self) -> dict[str, Any]:
        """The recipe with some training rows set aside, by which candidates are ranked."""
        recipe, data = self.recipe, self.recipe.data
        files = hold_out(data.train, self.folder / "data", parts=1 if data.test else 2, seed=recipe.seed)
        values = recipe.model_dump(mode="json", exclude={"data": {"train", "test", "select", "keep"}})
        sources = {"train": str(files[0]), "select": str(files[1]), "keep": data.keep}
        values["data"] |= {**sources, "test": data.test if data.test else str(files[2])}
        # Early dynamics are read step by step.
        values["training"] |= {"log_steps": 1, "eval_steps": None, "save_steps": None}
        values["output"] = str(self.folder / "run")
        return values

    # -- what is left

    def _write(
        self,
        findings: Findings,
        advice: Advice,
        outcome: Outcome | None,
        comparison: Mapping[str, Any] | None,
        verdict: Verdict,
        seconds: float,
    ) -> dict[str, Any]:
        made: dict[str, Any] = {
            "luthier": __version__,
            "model": self.recipe.model.id,
            "data": str(self.recipe.data.train),
            "task": self.plan.task,
            "budget": self.budget,
            "seconds": seconds,
            "findings": findings.to_list(),
            "rules": {
                "candidates": [{"entry": c.entry, **_told(c.rule)} for c in advice.candidates],
                "remarks": [{**_told(r), "kind": r.kind} for r in advice.remarks],
                "left_out": advice.left_out,
            },
            "race": outcome.to_dict() if outcome else None,
            "comparison": comparison,
            "verdict": verdict.to_dict(),
            "recommended": self._recommended(advice, verdict),
        }
        write_atomic(self.folder / "recommended.yaml", made["recommended"])
        write_page(made, self.folder / FILE)
        # Last, so that a folder with it is complete. The comparison has a file of its own.
        write_json(self.folder / "advice.json", {**made, "comparison": comparison and "comparison.json"})
        return {**made, "folder": str(self.folder)}

    def _recommended(self, advice: Advice, verdict: Verdict) -> str:
        from luthier.comparison.entries import Entry, parse
        from luthier.comparison.run import Comparison

        chosen = verdict.recipe_of
        entry = Entry(SFT) if chosen == SFT else parse([chosen])[0]
        recipe = Comparison(self.recipe, seeds=1, output=self.folder).recipe_of(entry)
        recipe.output = f"runs/{self.folder.name.removeprefix('advice-')}-advised"
        rule = next((c.rule for c in advice.candidates if c.entry == chosen), None)
        reasons = {}
        if rule is not None:
            why = f"{rule.why} ({rule.source})"
            changed = [key for key in METHOD_KEYS if getattr(recipe, key) != getattr(self.recipe, key)]
            reasons = {(changed or ["training"])[0]: why}
        head = [verdict.headline]
        if verdict.entry == BASE:
            head.append("If you train all the same, start with this recipe.")
        head.append(f"The evidence is in {FILE} beside this file. Run it with: luthier train recommended.yaml")
        return written(recipe, reasons, head)


def _told(rule: Rule) -> dict[str, str]:
    return {"rule": rule.name, "why": rule.why, "source": rule.source}


def advise(model: str, data: str, *, quiet: bool = False, **options: Any) -> dict[str, Any]:
    """Say which method fits a model and its data, with the evidence: the Python form of ``luthier advise``.

    Args:
        model: a model folder, a hub id, or ``lab:<name>``.
        data: training rows.
        quiet: show no progress.
        options: those of :class:`Advisor`: ``test``, ``budget``, ``methods``, ``seeds``, ``race``, ``output``,
            ``overrides``, ``sample_rows``, ``answered_rows``.

    Returns:
        What ``advice.json`` holds, with ``folder`` and the whole comparison.

    Raises:
        UserError: anything wrong with the inputs.

    Example::

        found = luthier.advise("lab:nano", "lab:sentences?layout=pair&noise=0.2", budget="10m")
        print(found["verdict"]["headline"])
    """
    from luthier.advisor.watch import Watch

    with Watch(quiet=quiet) as watch:
        return Advisor(model, data, say=watch.say, watch=watch.standing, **options).run()
