"""Successive halving inside a time budget: many candidates begin, few finish, plain SFT always does.

At a tenth and at three tenths of the training the worse half stops, by the score on held-out rows; at the first of
these, candidates that share everything but ``training`` values are first ranked by their early dynamics (see
:mod:`luthier.advisor.early`), and a run that clearly diverges stops whatever its score. Candidates run to equal shares
of the training rows, so that batches of other sizes meet at equal samples.

Every call of the runner is kept in ``race.json`` with its seconds, and every decision is a function of what is kept: a
race killed anywhere and begun again takes the same way to the same end, and pays for nothing twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from luthier.advisor import early
from luthier.core.errors import UserError
from luthier.core.store import write_json

SFT = "sft"
RUNGS = (0.1, 0.3, 1.0)
KEEP = 0.5
FINALISTS = 2
# Steps of plain SFT that tell the pace of this machine; the shortest training that tells anything, in steps and as a
# share of the recipe's.
PILOT_STEPS = 10
SHORTEST = 30
LEAST_LENGTH = 0.3
# A base that is good already has a loss that moves little at first: what stops a run must be more than noise.
SURELY = 3.0
# How the window is kept.
WINDOW = {"G": "gradnorm", "Lt": "loss", "initial": "initial", "rate": "rate", "noise": "noise"}
# The part of the budget that the race may use; the rest is for the final comparison over seeds.
RACE_SHARE = 0.5


@dataclass(frozen=True)
class Progress:
    """What a runner gives.

    Attributes:
        step: optimiser steps done.
        score: on the held-out rows after that step, more is better; None where it was not measured.
        seconds: wall seconds of this call.
        training_seconds: seconds of them spent in steps.
        records: the run's training records from its first step, one per step.
        failed: why it cannot go on; empty where it can.
    """

    step: int
    score: float | None
    seconds: float
    training_seconds: float
    records: list[dict[str, Any]] = field(default_factory=list)
    failed: str = ""


class Runner(Protocol):
    """Trains candidates piece by piece."""

    def steps(self, entry: str, length: float) -> int:
        """Optimiser steps of an entry over a share of the recipe's training."""

    def group(self, entry: str) -> str:
        """Entries of one group differ in values of ``training`` only, so that their losses have one scale."""

    def run_to(self, entry: str, step: int, length: float) -> Progress:
        """Go on from wherever the entry is to ``step``; the schedule is laid out for that share of the training."""


@dataclass
class Standing:
    """How far an entry came.

    Attributes:
        entry: the entry.
        status: ``waiting``, ``finished``, ``stopped`` or ``failed``.
        reason: why it stopped or failed.
        step: optimiser steps done.
        total: those of the whole (possibly shortened) training.
        scores: score by share of the training.
        dynamics: ``{"G", "Lt"}`` at the first rung, with ``combined``, ``loss`` and ``gradnorm`` where it was ranked.
        rate: of its last steps, seconds per step.
    """

    entry: str
    total: int
    status: str = "waiting"
    reason: str = ""
    step: int = 0
    scores: dict[str, float | None] = field(default_factory=dict)
    dynamics: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0

    @property
    def score(self) -> float:
        """The last score; minus infinity without one."""
        last = next(reversed(self.scores.values()), None)
        return -math.inf if last is None else last

    def stop(self, reason: str, status: str = "stopped") -> None:
        """Take it out of the race."""
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Outcome:
    """The end of a race.

    Attributes:
        standings: every entry, in the order given.
        finalists: entries that finished besides plain SFT, the best first.
        length: the share of the full training that was raced over; 1 where the budget allowed all of it.
        seconds: spent by all calls of the runner.
        overhead: seconds of a call besides its steps.
        trial_seconds: of a whole trial with its final evaluation, the slowest of those that finished.
        notes: what the budget or the early rule decided, in sentences.
    """

    standings: list[Standing]
    finalists: list[str]
    length: float
    seconds: float
    overhead: float
    trial_seconds: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Race:
    """A race of entries under a budget.

    Args:
        runner: trains them.
        file: ``race.json``, where every call is kept.
        budget: seconds for race and final comparison together.
        observe: told of every standing that changed.
    """

    def __init__(
        self,
        runner: Runner,
        file: Path,
        budget: float,
        *,
        observe: Callable[[Standing], None] = lambda standing: None,
    ) -> None:
        self.runner, self.file, self.budget, self.observe = runner, file, budget, observe
        self.calls: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
        self.seconds, self.overhead = 0.0, 0.0
        self.ends: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self, entries: Sequence[str]) -> Outcome:
        """Race plain SFT and the entries, the most promising first.

        Raises:
            UserError: the budget does not even pay for a short plain SFT.
        """
        names = [SFT, *(e for e in dict.fromkeys(entries) if e != SFT)]
        count, length = self._fit(names)
        standings = {n: Standing(n, self.runner.steps(n, length)) for n in names}
        for name in names[count:]:
            standings[name].stop("the budget pays for fewer candidates")
            self.observe(standings[name])
        rungs = _rungs(count)
        for rung, share in enumerate(rungs):
            self._climb(list(standings.values()), share, length)
            running = [s for s in standings.values() if s.status == "waiting"]
            if share == 1.0:
                for standing in running:
                    standing.status = "finished"
                    self.observe(standing)
                break
            if rung == 0:
                self._early(running)
            self._halve([s for s in running if s.status == "waiting"], last=rung == len(rungs) - 2)
        done = [s for s in standings.values() if s.status == "finished" and s.entry != SFT]
        finalists = [s.entry for s in sorted(done, key=lambda s: -s.score)]
        return Outcome(
            standings=list(standings.values()),
            finalists=finalists,
            length=length,
            seconds=self.seconds,
            overhead=self.overhead,
            trial_seconds=max(
                self.ends[s.entry] + s.rate * s.total for s in standings.values() if s.entry in self.ends
            ),
            notes=self.notes,
        )

    # -- the budget

    def _fit(self, names: Sequence[str]) -> tuple[int, float]:
        """(how many entries, the share of the full training) that the budget pays for, by a few steps of plain SFT.

        Fewer entries are raced rather than all over a training too short to tell them apart.
        """
        planned = self.runner.steps(SFT, 1.0)
        pilot = self._call(SFT, min(PILOT_STEPS, planned), 1.0)
        if pilot.failed:
            raise UserError(f"plain SFT does not run, so there is nothing to compare with: {pilot.failed}")
        pace = pilot.training_seconds / max(pilot.step, 1)
        self.overhead = pilot.seconds - pilot.training_seconds
        least = min(1.0, max(LEAST_LENGTH, math.ceil(1000 * SHORTEST / planned) / 1000))
        for entries in range(len(names), 1, -1):
            if (affordable := self._affordable(entries, pace * planned)) >= least or entries == 2:
                break
        else:
            entries, affordable = 1, self._affordable(1, pace * planned)
        length = min(1.0, max(math.floor(1000 * affordable) / 1000, least))
        if length < 1.0:
            self.notes.append(
                f"The budget pays for {length:.0%} of the training per candidate: all are compared over that part, "
                "with the learning rate laid out for it."
            )
        return entries, length

    def _affordable(self, entries: int, training: float) -> float:
        """The share of a full training, which takes ``training`` seconds, that every entry could be raced over."""
        counts = _counts(entries)
        rungs = _rungs(entries)
        shares = [share - before for before, share in zip((0.0, *rungs), rungs, strict=False)]
        trainings = sum(n * share for n, share in zip(counts, shares, strict=True))
        return (self._left() - sum(counts) * self.overhead) / (training * trainings)

    def _left(self) -> float:
        return self.budget * RACE_SHARE - self.seconds

    def _climb(self, standings: list[Standing], share: float, length: float) -> None:
        """Take everyone still in the race to a share of the training; who cannot be paid for stops."""
        for standing in standings:
            if standing.status != "waiting":
                continue
            step = rung_step(share, standing.total)
            rates = [s.rate for s in standings if s.rate]
            cost = self.overhead + (standing.rate or max(rates, default=0.0)) * (step - standing.step)
            # Plain SFT is what everything is measured against: it is paid for in any case.
            if standing.entry != SFT and cost > self._left():
                standing.stop(f"the budget was used up before it could reach {share:.0%}")
                self.observe(standing)
                continue
            found = self._call(standing.entry, step, length)
            if not standing.dynamics:
                self._look(standing, found)
            steps = found.step - standing.step
            standing.rate = found.training_seconds / steps if steps > 0 else standing.rate
            standing.step = found.step
            standing.scores[f"{share:g}"] = found.score
            if share == 1.0 and not found.failed:
                self.ends[standing.entry] = found.seconds - found.training_seconds
            if found.failed:
                standing.stop(found.failed, "failed")
            self.observe(standing)

    def _call(self, entry: str, step: int, length: float) -> Progress:
        key = f"{entry} to step {step} over {length:g}"
        if key not in self.calls:
            found = self.runner.run_to(entry, step, length)
            # Only the beginning is judged by its records.
            last = every(self.runner.steps(entry, length))
            self.calls[key] = asdict(replace(found, records=[r for r in found.records if r["step"] <= last]))
            write_json(self.file, self.calls)
        found = Progress(**self.calls[key])
        self.seconds += found.seconds
        return found

    # -- the decisions

    def _look(self, standing: Standing, found: Progress) -> None:
        """Keep how it began."""
        # Plain likelihood is logged beside every objective; it is the loss whose level can be read across entries.
        records = [{**r, "loss": r.get("nll", r["loss"])} for r in found.records]
        try:
            seen = early.window(records, since=0, until=min(found.step, every(standing.total)), rate=_rate(records))
        except UserError:
            return  # too short to be judged by how it began
        standing.dynamics = {name: getattr(seen, field) for name, field in WINDOW.items()}

    def _early(self, running: list[Standing]) -> None:
        """The early-dynamics rule, in each group whose losses have one scale."""
        seen = {s.entry: _window(s.dynamics) for s in running if s.dynamics}
        for standing in running:
            if standing.entry != SFT and standing.entry in seen:
                reason = early.unhealthy(seen[standing.entry], beyond=SURELY)
                if reason:
                    standing.stop(reason)
                    self.observe(standing)
        groups: dict[str, list[Standing]] = {}
        for standing in running:
            # The loss of a run that does not learn yet ranks high for no merit: its score alone decides.
            learns = standing.entry in seen and not early.unhealthy(seen[standing.entry], least_drop=early.LEAST_DROP)
            if standing.status == "waiting" and learns:
                groups.setdefault(self.runner.group(standing.entry), []).append(standing)
        for members in groups.values():
            z = early.indicators([seen[s.entry] for s in members])
            for i, standing in enumerate(members):
                standing.dynamics |= {name: float(values[i]) for name, values in z.items()}
            if len(members) <= early.FEWEST:
                continue
            kept, stopped = early.survivors({s.entry: seen[s.entry] for s in members}, keep=KEEP)
            for standing in members:
                if standing.entry not in kept and standing.entry != SFT:
                    standing.stop(stopped[standing.entry])
                    self.observe(standing)

    def _halve(self, running: list[Standing], *, last: bool) -> None:
        """The worse half by score stops; plain SFT goes on."""
        others = sorted((s for s in running if s.entry != SFT), key=lambda s: -s.score)
        keep = FINALISTS if last else max(math.ceil((len(others) + 1) * KEEP) - 1, FINALISTS)
        for standing in others[keep:]:
            best = others[0].score
            standing.stop(f"its held-out score {standing.score:.4g} was outside the best {keep} (best {best:.4g})")
            self.observe(standing)


def _rungs(entries: int) -> tuple[float, ...]:
    """Where a race of so many stops to look; nowhere before the end where all may be finalists."""
    return RUNGS if entries > FINALISTS + 1 else RUNGS[-1:]


def _counts(entries: int) -> list[int]:
    """How many entries reach each rung."""
    counts = [entries]
    for _ in _rungs(entries)[1:-1]:
        counts.append(min(counts[-1], max(math.ceil(counts[-1] * KEEP), FINALISTS + 1)))
    return counts if len(_rungs(entries)) == 1 else [*counts, min(counts[-1], FINALISTS + 1)]


def every(total: int) -> int:
    """Steps between two evaluations of a trial: a tenth of its training, so that every rung is one of them."""
    return math.ceil(RUNGS[0] * total - 1e-9)


def rung_step(share: float, total: int) -> int:
    """The step of a rung; a whole multiple of that of the first one, or the last step."""
    return min(total, round(share / RUNGS[0]) * every(total))


def _window(dynamics: dict[str, float]) -> early.Window:
    return early.Window(**{field: dynamics[name] for name, field in WINDOW.items()})


def _rate(records: Sequence[dict[str, Any]]) -> float:
    """The highest learning rate that was logged."""
    return max((float(r.get("learning_rate", 0.0)) for r in records), default=0.0)


def seeds_for(left: float, entries: int, seconds: float, most: int) -> int:
    """How many seeds of a final comparison the time left pays for, from 1 to ``most``; the first is run already.

    Args:
        left: seconds.
        entries: trials per seed.
        seconds: of one trial.
        most: as many as asked for.
    """
    return max(1, min(most, 1 + int(left / max(entries * seconds, 1e-9))))
