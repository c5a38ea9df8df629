"""When trials run, with processes that are only played."""

import json

import pytest

from luthier.comparison import schedule
from luthier.comparison.schedule import run_to, run_trials
from luthier.comparison.trial import Trial, reason
from luthier.core.errors import LuthierError


class Played:
    """A pool whose trials end after two looks; it notes who ran beside whom."""

    def __init__(self, failing=(), pausing=()):
        self.failing, self.pausing = set(failing), set(pausing)
        self.running, self.beside, self.order, self.stopped = {}, [], [], []

    def start(self, folder, *, threads, alone):
        self.order.append(folder.name)
        self.running[folder.name] = 2
        self.beside.append((folder.name, alone, sorted(self.running)))
        return folder

    def poll(self, folder):
        self.running[folder.name] -= 1
        if self.running[folder.name] > 0:
            return None
        del self.running[folder.name]
        if folder.name in self.failing:
            (folder / "log.txt").write_text("something\nerror: out of rows\nTraceback\n")
            return 2
        name = "paused" if folder.name in self.pausing else "result"
        cost = {"peak_memory_bytes": 1}
        (folder / f"{name}.json").write_text(json.dumps({"status": name, "alone": True, "cost": cost, "step": 3}))
        return 0

    def stop(self, handles):
        self.stopped += handles


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0)


def trials(*names, seeds=(0, 1)):
    return [Trial(name, seed, "recipe", f"{name}-{seed}") for name in names for seed in seeds]


def first(trial):
    return trial.seed == 0


def test_those_whose_cost_is_reported_run_first_and_alone_the_others_side_by_side(tmp_path):
    pool = Played()
    failed = run_trials(trials("a", "b"), tmp_path, pool, jobs=2, threads=1, alone=first)
    assert failed == {}
    assert pool.order == ["a-0", "b-0", "a-1", "b-1"]
    assert pool.beside == [
        ("a-0", True, ["a-0"]),
        ("b-0", True, ["b-0"]),
        ("a-1", False, ["a-1"]),
        ("b-1", False, ["a-1", "b-1"]),
    ]


def test_what_is_stored_does_not_run_again_and_what_is_new_does(tmp_path):
    run_trials(trials("a"), tmp_path, Played(), jobs=1, threads=1, alone=first)
    pool, seen = Played(), []
    run_trials(
        trials("a", "b"),
        tmp_path,
        pool,
        jobs=1,
        threads=1,
        alone=first,
        observe=lambda t, s, r: seen.append((t.key, s)),
    )
    assert pool.order == ["b-0", "b-1"]
    assert ("a-0", "done") in seen


def test_a_failed_trial_is_told_with_its_reason_while_the_others_finish(tmp_path):
    pool = Played(failing=["a-0"])
    failed = run_trials(trials("a", "b"), tmp_path, pool, jobs=2, threads=1, alone=first)
    assert failed == {"a-0": "out of rows"}
    assert set(pool.order) == {"a-0", "a-1", "b-0", "b-1"}
    # The next call tries it again.
    again = Played()
    assert run_trials(trials("a", "b"), tmp_path, again, jobs=1, threads=1, alone=first) == {}
    assert again.order == ["a-0"]


def test_one_trial_that_several_entries_share_runs_once(tmp_path):
    pool = Played()
    run_trials([*trials("a"), *trials("a")], tmp_path, pool, jobs=2, threads=1, alone=first)
    assert pool.order == ["a-0", "a-1"]


def test_an_interrupt_stops_what_is_running(tmp_path):
    class Interrupted(Played):
        def poll(self, folder):
            raise KeyboardInterrupt

    pool = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run_trials(trials("a"), tmp_path, pool, jobs=1, threads=1, alone=first)
    assert [f.name for f in pool.stopped] == ["a-0"]


def test_nothing_starts_beside_another_where_memory_is_short(tmp_path, monkeypatch):
    class Full:
        available = 1

    monkeypatch.setattr(schedule.psutil, "virtual_memory", lambda: Full)
    pool = Played()
    run_trials(trials("a", "b"), tmp_path, pool, jobs=4, threads=1, alone=first)
    assert all(len(running) == 1 for _, _, running in pool.beside)


def test_a_trial_may_stop_at_a_step_and_go_on(tmp_path):
    (trial, *_) = trials("a")
    assert run_to(trial, tmp_path, Played(pausing=["a-0"]), threads=1, until=3)["status"] == "paused"
    assert json.loads((trial.folder(tmp_path) / "spec.json").read_text())["until"] == 3
    assert run_to(trial, tmp_path, Played(), threads=1, until=None)["status"] == "result"
    with pytest.raises(LuthierError, match="out of rows"):
        run_to(trials("b")[0], tmp_path, Played(failing=["b-0"]), threads=1, until=None)


def test_the_reason_of_a_process_that_said_nothing(tmp_path):
    assert "without a word" in reason(tmp_path)
