"""The diagnosis of a model and dataset, against counts made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeContext

from luthier.core.errors import UserError
from luthier.functional.continuum import diagnose, gradient_mass
from luthier.functional.probability_losses import parse
from luthier.methods.analysis.continuum import ContinuumAnalysis


def test_statistics_by_hand():
    p = np.array([0.95, 0.92, 0.5, 0.05])
    found = diagnose(np.log(p))
    assert found.mean_p == pytest.approx(0.605)
    assert found.mean_logp == pytest.approx(np.log(p).mean())
    assert found.position == "intermediate"
    assert (found.share_below_01, found.share_above_09) == (0.25, 0.5)
    # bins of width 0.05: 0.05 -> 1, 0.5 -> 10, 0.92 -> 18, 0.95 -> 19 (up to the rounding of exp(log p))
    assert sum(found.histogram) == pytest.approx(1.0)
    assert found.histogram[18] == 0.25
    assert found.standard_error == pytest.approx(p.std() / 2)


@pytest.mark.parametrize(
    ("p", "position", "member"), [(0.8, "strong", "p"), (0.3, "weak", "nll"), (0.6, "intermediate", "nll")]
)
def test_positions_and_recommendations(p, position, member):
    found = diagnose(np.full(9, math.log(p)))
    assert (found.position, str(found.member)) == (position, member)
    assert diagnose(np.full(9, math.log(p)), strong_from=p - 0.01, weak_up_to=0.0).position == "strong"


def test_rows_count_as_the_independent_unit():
    # Two rows of perfectly equal tokens are two observations, not six.
    logp_N = np.log([0.2] * 3 + [0.8] * 3)
    alone = diagnose(logp_N)
    by_row = diagnose(logp_N, np.array([0, 0, 0, 1, 1, 1]))
    assert alone.standard_error == pytest.approx(0.3 / math.sqrt(6))
    assert by_row.standard_error == pytest.approx(0.3 / math.sqrt(2))


def test_gradient_mass_of_each_loss_by_hand():
    p = np.array([0.92, 0.52, 0.07])
    mass = gradient_mass(np.log(p), [parse("nll"), parse("p"), parse("top_logp-0.5"), parse("general-2")])
    assert mass["nll"][18] == pytest.approx(1 / 3)
    assert mass["p"][18] == pytest.approx(0.92 / p.sum())
    assert mass["p"][1] == pytest.approx(0.07 / p.sum())
    assert mass["top_logp-0.5"][1] == 0.0
    assert mass["top_logp-0.5"][10] == pytest.approx(0.5)
    assert mass["general-2"][10] == pytest.approx(0.52**2 / (p**2).sum())
    assert all(sum(row) == pytest.approx(1.0) for row in mass.values())


def test_empty_or_contradictory_input_is_refused():
    with pytest.raises(ValueError, match="no supervised positions"):
        diagnose(np.zeros(0))
    with pytest.raises(ValueError, match="weak_up_to < strong_from"):
        diagnose(np.zeros(3), strong_from=0.2, weak_up_to=0.3)
    with pytest.raises(UserError, match="weak_up_to"):
        ContinuumAnalysis(strong_from=0.1)
    with pytest.raises(UserError, match="unknown member"):
        ContinuumAnalysis(members=["nothing"])


class Rows:
    def __init__(self, count):
        self.count, self.asked = count, []

    def __len__(self):
        return self.count

    def fetch(self, indices):
        self.asked += list(indices)
        return {"input_ids": list(indices)}


def test_the_table_names_limits_and_suggestion_and_scores_only_a_sample():
    rows = Rows(1000)
    ctx = FakeContext(scores=[torch.tensor([math.log(0.9), math.log(0.8)]), torch.tensor([math.log(0.85)])])
    ctx.data = SimpleNamespace(train=SimpleNamespace(prepared=rows))
    found = ContinuumAnalysis(rows=4).run([], ctx)
    sample, model = ctx.scored
    assert (len(sample), model) == (4, "base")
    assert sample.fetch([0, 3])["input_ids"] == [0, 999]
    assert found.title.endswith("strong")
    assert len(found.rows) == 20
    assert found.columns == ("p from", "p to", "tokens", "nll", "p", "general-10", "top_p-0.5")
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert "n 3 tokens of 2 rows" in found.notes[0]
    assert "strong from 0.75, weak up to 0.35" in found.notes[1]
