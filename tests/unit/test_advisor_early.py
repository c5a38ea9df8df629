"""The early-termination rule on tables worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from luthier.advisor.early import Window, check_comparable, indicators, observe, saved_samples, survivors, unhealthy
from luthier.advisor.early import window as window_of
from luthier.core.errors import UserError

# Four healthy runs with ties in G (a, b) and in Lt (a, c), one that diverged, one that does not learn.
TABLE = {
    "a": Window(gradnorm=1.0, loss=2.0, initial=3.0, rate=1e-4),
    "b": Window(gradnorm=1.0, loss=1.8, initial=3.0, rate=1e-4),
    "c": Window(gradnorm=3.0, loss=2.0, initial=3.0, rate=1e-3),
    "d": Window(gradnorm=2.0, loss=1.0, initial=3.0, rate=1e-3),
    "nan": Window(gradnorm=math.nan, loss=math.nan, initial=3.0, rate=1e-2),
    "still": Window(gradnorm=0.1, loss=2.99, initial=3.0, rate=1e-9),
}


@pytest.mark.parametrize(
    ("indicator", "within", "kept"),
    [
        # rank(G): a, b 1.5, d 3, c 4. rank(Lt): d 1, b 2, a, c 3.5. z: a 2, b 0.5, c -0.5, d -2.
        ("combined", "all", ["a", "b"]),
        ("loss", "all", ["a", "c"]),
        ("gradnorm", "all", ["a", "b"]),
        # Within rates rank(G): a, b 1.5; d 1, c 2. z: a 2, b 0.5, c 1.5, d 0.
        ("combined", "rate", ["a", "c"]),
        ("gradnorm", "rate", ["d", "a"]),
    ],
)
def test_survivors_of_the_table_at_the_last_probe(indicator, within, kept):
    found, stopped = survivors(TABLE, indicator=indicator, within=within, last_probe=True)
    assert found == kept
    assert stopped["nan"] == "its loss or gradient is not finite"
    assert stopped["still"] == "its loss has fallen by less than 2% from 3"
    assert set(found) | set(stopped) == set(TABLE)


def test_before_the_last_probe_a_run_may_still_be_slow():
    # rank(G): still 1, a, b 2.5, d 4, c 5. rank(Lt): d 1, b 2, a, c 3.5, still 5. z: still 4, a 1, b -0.5, c -1.5, d -3.
    found, stopped = survivors(TABLE)
    assert found == ["still", "a", "b"]
    assert set(stopped) == {"c", "d", "nan"}


@pytest.mark.parametrize(("keep", "count"), [(0.01, 2), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)])
def test_the_share_is_rounded_up_and_never_fewer_than_two_stay(keep, count):
    assert len(survivors(TABLE, keep=keep, last_probe=True)[0]) == count


def test_one_healthy_run_goes_on_and_none_is_no_error():
    assert survivors({k: TABLE[k] for k in ("a", "nan")})[0] == ["a"]
    assert survivors({"nan": TABLE["nan"]})[0] == []


def test_the_gate():
    assert unhealthy(Window(1.0, 3.5, 3.0)) == "its loss rose from 3 to 3.5"
    assert unhealthy(Window(math.inf, 1.0, 3.0)) == "its loss or gradient is not finite"
    assert not unhealthy(Window(1.0, 3.0, 3.0))
    assert not unhealthy(Window(1.0, 3.5, 3.0, noise=0.2), beyond=3.0)
    assert unhealthy(Window(1.0, 3.7, 3.0, noise=0.2), beyond=3.0)
    assert unhealthy(Window(1.0, 3.0, 3.0), least_drop=0.02)
    assert not unhealthy(Window(1.0, 2.94, 3.0), least_drop=0.02)


def test_ranks_of_one_group_are_plain_ranks():
    z = indicators([TABLE[n] for n in "abcd"])
    assert z["combined"].tolist() == [2.0, 0.5, -0.5, -2.0]
    assert z["loss"].tolist() == [3.5, 2.0, 3.5, 1.0]
    assert z["gradnorm"].tolist() == [-1.5, -1.5, -4.0, -3.0]


def test_a_window_leaves_out_the_first_steps_the_warmup_and_evaluations():
    records = [
        {"step": s, "loss": 20.0 - s, "grad_norm": float(s), "tokens": 3 if s == 10 else 1, "split": "train"}
        for s in range(1, 13)
    ]
    records.append({"step": 8, "loss": 99.0, "split": "eval"})
    found = window_of(records, since=0, until=10, rate=0.1)
    # Steps 6 to 10 with losses 14 to 10 and 1, 1, 1, 1, 3 tokens; the first five have losses 19 to 15.
    # Both sets of losses are five consecutive numbers, of variance 2.
    noise = pytest.approx(math.sqrt(2 / 5 + 2 / 5))
    loss = pytest.approx((14 + 13 + 12 + 11 + 30) / 7)
    assert found == Window(gradnorm=8.0, loss=loss, initial=17.0, rate=0.1, noise=noise)
    assert window_of(records, since=10, until=12).gradnorm == 11.5
    assert window_of(records, since=0, until=12, warmup_steps=10).gradnorm == 11.5
    # A probe at step 4 has two steps to look at and two to compare them with.
    early = window_of(records, since=0, until=4)
    assert (early.gradnorm, early.loss, early.initial) == (3.5, 16.5, 18.5)
    with pytest.raises(UserError, match="no step between 10 and 10"):
        window_of(records, since=0, until=10, warmup_steps=10)


def test_observing_reports_every_sign_and_regret():
    final = {"a": 0.9, "b": 0.7, "c": 0.95, "d": 0.5, "nan": 0.1, "still": 0.2}
    found = observe(TABLE, final, resamples=200)
    order = ["a", "b", "c", "d"]
    score = [final[n] for n in order]
    assert found["Lt"]["spearman"] == pytest.approx(spearmanr([TABLE[n].loss for n in order], score).statistic)
    assert found["-G"]["spearman"] == pytest.approx(spearmanr([-TABLE[n].gradnorm for n in order], score).statistic)
    assert found["-G"]["spearman"] < 0  # a wrong sign is shown
    assert found["loss"]["kept"] == ["a", "c"]
    assert found["loss"]["regret"] == 0.0
    assert found["combined"]["regret"] == pytest.approx(0.05)
    assert found["loss"]["low"] <= found["loss"]["spearman"] <= found["loss"]["high"]
    assert observe(TABLE, final, resamples=200) == found


def test_saved_samples():
    assert saved_samples({"a": 100, "b": 100}, {"a": 100, "b": 10}) == pytest.approx(0.45)


def test_runs_with_other_loss_levels_are_not_ranked():
    alike = {"a": {"model": "m", "objective": "sft"}, "b": {"model": "m", "objective": "dynamic-ft"}}
    with pytest.raises(UserError, match="'a' against 'b': their objective differ"):
        check_comparable(alike)
    check_comparable({"a": {"model": "m"}, "b": {"model": "m"}})


def test_ranks_do_not_depend_on_the_scale():
    rng = np.random.default_rng(0)
    runs = [Window(*rng.random(2), initial=2.0) for _ in range(9)]
    scaled = [Window(7 * r.gradnorm, 0.1 * r.loss, 2.0) for r in runs]
    np.testing.assert_array_equal(indicators(runs)["combined"], indicators(scaled)["combined"])
