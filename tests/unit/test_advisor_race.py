"""The race with a runner that only pretends: who stops when, that the budget is held, and that a kill changes nothing."""

from __future__ import annotations

import json
import math

import pytest

from luthier.advisor.race import SFT, Progress, Race, seeds_for
from luthier.core.errors import UserError


class Killed(BaseException):
    """What a killed process looks like from inside."""


class Fake:
    """Entries that train at a known pace towards a known score.

    Args:
        scores: final score by entry.
        planned: steps of the whole training.
        pace: seconds per step.
        start: seconds of a call besides its steps.
        broken: entries that fail at their first call.
        losses: (first loss, later loss, gradient norm) by entry.
        die_after: calls after which the process is killed.
    """

    def __init__(
        self, scores, *, planned=1000, pace=0.01, start=1.0, broken=(), losses=None, groups=None, die_after=None
    ):
        self.scores, self._planned, self.pace, self.start = scores, planned, pace, start
        self.broken, self.losses, self.groups = broken, losses or {}, groups or {}
        self.die_after, self.calls, self.at = die_after, [], {}

    def steps(self, entry, length):
        return max(1, round(length * (self._planned // 4 if "batch" in entry else self._planned)))

    def group(self, entry):
        return self.groups.get(entry, entry)

    def run_to(self, entry, step, length):
        if self.die_after is not None and len(self.calls) >= self.die_after:
            raise Killed
        total = self.steps(entry, length)
        self.calls.append((entry, step, total))
        if entry in self.broken:
            return Progress(0, None, self.start, 0.0, failed="out of memory")
        done = self.at.get((entry, total), 0)
        self.at[entry, total] = step
        first, later, norm = self.losses.get(entry, (3.0, 2.0, 1.0))
        records = [
            {"step": s, "loss": first if s <= 5 else later, "grad_norm": norm, "learning_rate": 1e-3}
            for s in range(1, step + 1)
        ]
        seconds = self.pace * (step - done)
        return Progress(step, self.scores[entry] * step / total, self.start + seconds, seconds, records)


SCORES = {SFT: 0.5, "a": 0.9, "b": 0.8, "c": 0.4, "d": 0.3, "e": 0.2, "f": 0.1}


def race(tmp_path, runner, entries, budget=1e4):
    return Race(runner, tmp_path / "race.json", budget).run(entries)


def test_the_worse_half_stops_at_each_rung_and_sft_always_finishes(tmp_path):
    runner = Fake(SCORES | {SFT: 0.0})
    found = race(tmp_path, runner, "abcdef")
    # Seven begin; of the six besides SFT three go on at a tenth (four of seven with SFT), two at three tenths.
    reached = {s.entry: s.step for s in found.standings}
    assert reached == {SFT: 1000, "a": 1000, "b": 1000, "c": 300, "d": 100, "e": 100, "f": 100}
    assert found.finalists == ["a", "b"]
    assert found.length == 1.0
    status = {s.entry: s.status for s in found.standings}
    assert status == {SFT: "finished", "a": "finished", "b": "finished"} | dict.fromkeys("cdef", "stopped")
    assert "outside the best 2" in next(s.reason for s in found.standings if s.entry == "c")


def test_other_batches_meet_at_equal_samples(tmp_path):
    runner = Fake({SFT: 0.5, "large batch": 0.6} | dict.fromkeys("abc", 0.1))
    race(tmp_path, runner, ["large batch", *"abc"])
    assert [c for c in runner.calls if c[0] == "large batch"] == [
        ("large batch", 25, 250),
        ("large batch", 75, 250),
        ("large batch", 250, 250),
    ]


@pytest.mark.parametrize("budget", [60.0, 120.0, 300.0, 1000.0])
def test_the_budget_is_held(tmp_path, budget):
    runner = Fake(SCORES, planned=3000, pace=0.02)
    found = race(tmp_path, runner, "abcdef", budget)
    # Half of it is the race's; the rest is kept for the final comparison.
    assert found.seconds <= budget / 2 + 1e-6
    spent = sum(runner.start + 0.0 for _ in runner.calls) + sum(runner.pace * s for s in runner.at.values())
    assert found.seconds == pytest.approx(spent)
    if budget < 1000:
        assert found.length < 1.0
        assert "of the training per candidate" in found.notes[0]


def test_what_cannot_be_paid_for_is_said(tmp_path):
    # Plain SFT's pace promised more than entry "slow" allows.
    class Slow(Fake):
        def run_to(self, entry, step, length):
            found = super().run_to(entry, step, length)
            if entry != "slow":
                return found
            return Progress(found.step, found.score, found.seconds * 50, found.training_seconds * 50, found.records)

    runner = Slow(SCORES | {"slow": 0.95}, planned=500)
    found = {s.entry: s for s in race(tmp_path, runner, ["a", "slow", "b", "c"], 120.0).standings}
    assert found["slow"].reason == "the budget was used up before it could reach 30%"
    assert found["b"].reason == found["c"].reason == "the budget was used up before it could reach 10%"
    assert found[SFT].status == "finished"


def test_a_small_budget_races_fewer_over_a_training_that_tells_something(tmp_path):
    runner = Fake(SCORES, planned=1000, pace=0.01, start=5.0)
    found = race(tmp_path, runner, "abcdef", 60.0)
    assert found.length >= 0.3
    raced = [s.entry for s in found.standings if s.step]
    assert raced == [SFT, "a", "b"][: len(raced)]
    assert found.standings[-1].reason == "the budget pays for fewer candidates"
    # Where all may be finalists nobody stops to be looked at, but how they began is kept.
    assert len(runner.calls) == 1 + len(raced)
    assert all(s.dynamics["G"] == 1.0 for s in found.standings if s.step)


def test_killed_anywhere_and_continued_it_takes_the_same_way(tmp_path):
    whole = Fake(SCORES)
    expected = race(tmp_path / "whole", whole, "abcdef").to_dict()
    for after in range(1, len(whole.calls)):
        folder = tmp_path / str(after)
        first = Fake(SCORES, die_after=after)
        with pytest.raises(Killed):
            race(folder, first, "abcdef")
        second = Fake(SCORES)
        second.at = dict(first.at)
        assert race(folder, second, "abcdef").to_dict() == expected
        assert first.calls + second.calls == whole.calls
    assert race(tmp_path / "whole", Fake({}), "abcdef").to_dict() == expected  # nothing is run twice
    assert json.loads((tmp_path / "whole" / "race.json").read_text())


def test_a_failed_candidate_is_reported_and_the_others_go_on(tmp_path):
    found = race(tmp_path, Fake(SCORES, broken=("a",)), "abc")
    failed = next(s for s in found.standings if s.entry == "a")
    assert (failed.status, failed.reason) == ("failed", "out of memory")
    assert found.finalists == ["b", "c"]


def test_without_a_running_sft_there_is_no_race(tmp_path):
    with pytest.raises(UserError, match="plain SFT does not run"):
        race(tmp_path, Fake(SCORES, broken=(SFT,)), "a")


def test_diverging_runs_stop_whatever_their_score_and_resting_ones_are_not_ranked_by_their_loss(tmp_path):
    losses = {"a": (3.0, 4.0, 1.0), "b": (3.0, 2.99, 0.1), "c": (3.0, math.nan, 1.0)}
    groups = dict.fromkeys([SFT, *"abcd"], "sft")
    found = {s.entry: s for s in race(tmp_path, Fake(SCORES, losses=losses, groups=groups), "abcd").standings}
    assert found["a"].reason == "its loss rose from 3 to 4"
    assert "combined" not in found["b"].dynamics
    assert found["b"].status == "finished"
    assert found["c"].reason == "its loss or gradient is not finite"
    assert found["d"].status == "finished"


def test_early_dynamics_decide_within_a_group_only_and_both_indicators_are_kept(tmp_path):
    # Three rates of plain SFT: lower norm and higher loss is better, so "hot" goes; "other" has its own scale.
    losses = {SFT: (3.0, 2.0, 1.0), "cool": (3.0, 2.5, 0.5), "hot": (3.0, 1.0, 4.0), "other": (9.0, 0.1, 50.0)}
    groups = dict.fromkeys([SFT, "cool", "hot"], "sft")
    scores = {SFT: 0.5, "cool": 0.6, "hot": 0.99, "other": 0.7}
    found = {s.entry: s for s in race(tmp_path, Fake(scores, losses=losses, groups=groups), scores).standings}
    assert found["hot"].reason == "outside the best 2 of 3 by the combined indicator"
    assert found["hot"].dynamics["combined"] == -2.0
    assert found["hot"].dynamics["loss"] == 1.0
    assert found["hot"].dynamics["gradnorm"] == -3.0
    assert found["cool"].dynamics["combined"] == 2.0
    assert (found["other"].dynamics["G"], found["other"].dynamics["Lt"]) == (50.0, pytest.approx(0.1))
    assert found["other"].status == "finished"


def test_seeds_follow_the_time_that_is_left():
    assert seeds_for(100.0, 3, 10.0, 3) == 3
    assert seeds_for(50.0, 3, 10.0, 3) == 2
    assert seeds_for(5.0, 3, 10.0, 3) == 1
