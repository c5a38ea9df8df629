"""The divergence from the base that stands beside every logged loss."""

import json

import numpy as np
import pytest
import torch

import luthier
from helpers import make_session, random_rows, settings, tiny_llama
from luthier.engine.loop import Trainer
from luthier.evaluation.divergence import DivergenceFromBase


def double_logits(model, rows, index):
    """[n, V] log-probabilities at every supervised position, row by row and without padding."""
    found = []
    for i in index:
        ids, (start, end) = torch.from_numpy(rows.ids[i].astype(np.int64)), rows.spans[i]
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        found.append(logits[start - 1 : end - 1].log_softmax(-1))
    return torch.cat(found)


def test_it_is_the_mean_divergence_over_the_rows_it_looks_at():
    rows, base = random_rows(5), tiny_llama(0, dropout=0.3).eval()
    watch = DivergenceFromBase(make_session(tiny_llama(0, dropout=0.3)), rows, rows=5, positions=1000)
    tuned = make_session(tiny_llama(1, dropout=0.3))
    tuned.model.train()
    p, q = double_logits(base, rows, range(5)), double_logits(tiny_llama(1).eval(), rows, range(5))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert watch(tuned)["kl_to_base"] == pytest.approx(expected, rel=1e-4)
    assert tuned.model.training


def test_the_base_itself_is_at_zero_and_few_positions_are_spread_over_all_rows():
    rows = random_rows(40)
    watch = DivergenceFromBase(make_session(tiny_llama(0)), rows, rows=4, positions=6)
    assert watch(make_session(tiny_llama(0)))["kl_to_base"] == 0.0
    assert watch.base_nV.shape == (6, 64)
    assert watch.batch.row_B.tolist() == [0, 13, 26, 39]
    assert set(watch.batch.sequence_N.tolist()) == {0, 1, 2, 3}


def test_it_does_not_touch_the_trajectory():
    def weights(watched):
        session, rows = make_session(tiny_llama(0, dropout=0.1)), random_rows()
        watch = DivergenceFromBase(make_session(tiny_llama(0)), rows) if watched else None
        Trainer(session, rows, settings(max_steps=4, log_steps=1), watch=watch).run()
        return torch.cat([p.flatten() for p in session.model.parameters()])

    assert torch.equal(weights(False), weights(True))


@pytest.mark.parametrize("parameters", ["full", "lora"])
def test_a_run_writes_it_beside_every_loss(tmp_path, parameters):
    luthier.tune(
        model="lab:nano",
        data={"train": "lab:arithmetic?n=32", "keep": None},
        parameters=[parameters],
        training={"batch_rows": 8, "learning_rate": 1e-3, "log_steps": 2},
        evaluation={"before": False},
        output=str(tmp_path / "run"),
        quiet=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["kl_to_base"] for line in lines if line["split"] == "train"]
    assert len(values) == 2
    assert all(v > 0 for v in values)
    assert all({"nll", "mean_probability"} <= set(line) for line in lines if line["split"] == "train")
