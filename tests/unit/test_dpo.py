"""DPO in the engine against numbers from plain forward passes, and its ways to name rejected answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import make_session, random_rows, settings, tiny_llama
from luthier.core.errors import UserError
from luthier.core.store import Store
from luthier.engine.loop import Trainer
from luthier.engine.reference import ReferenceScores
from luthier.methods.objectives.dpo import DirectPreferenceOptimization as DPO
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.transforms.masked_thought import MaskedThought


def moved_session(objective):
    """A session whose policy has left its reference."""
    session = make_session(objective=objective)
    for parameter in session.model.parameters():
        parameter.data.mul_(1.15)
    return session


def batch_of(session, rows, count=4):
    return session.task.collate(rows.fetch(range(count)), range(count), session.stack.needs.columns)


def sums(model, ids, start):
    """Log-probability of the tokens from ``start`` on, one row at a time."""
    with torch.no_grad():
        logp = model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))


def rho_of(session, rows, index, listed=None):
    """Log-ratios of the chosen and the rejected answers of a row, and their lengths."""
    reference, policy = tiny_llama().eval(), session.model.eval()
    ids, start = rows.ids[index].tolist(), int(rows.spans[index][0])
    if listed is None:
        others = [(rows.columns["rejected_ids"][index].tolist(), start)]
    else:
        prompt = [1, *map(int, rows.columns["prompt"][index].split())]
        texts = rows.columns["negatives"][index][:listed]
        others = [([*prompt, *map(int, t.split()), 2], len(prompt)) for t in texts]
    ratio = [sums(policy, i, s) - sums(reference, i, s) for i, s in ((ids, start), *others)]
    return ratio[0], ratio[1:], len(ids) - start, [len(i) - s for i, s in others]


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_the_loss_is_that_of_log_ratios_row_by_row(kind):
    session, rows = moved_session(DPO(loss=kind, beta=0.4)), random_rows()
    loss = session.loss(batch_of(session, rows))
    wanted = []
    for index in range(4):
        chosen, (rejected,), n, (m,) = rho_of(session, rows, index)
        h = 0.4 * (chosen - rejected)
        wanted.append({
            "sigmoid": np.log1p(np.exp(-h)), "hinge": max(0, 1 - h), "ipo": (chosen / n - rejected / m - 1.25) ** 2,
        }[kind])  # fmt: skip
    assert float(loss.sum) == pytest.approx(sum(wanted), rel=1e-4)
    assert float(loss.weight) == 4
    assert loss.unit == "sequence"


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_several_negatives_are_the_mean_of_their_pairs(alpha):
    session = moved_session(DPO(rejected_from="negatives", negatives=3, beta=0.4, tail_weight=alpha))
    rows = random_rows()
    whole = session.loss(batch_of(session, rows))
    single = DPO(rejected_from="negatives", negatives=1, beta=0.4, tail_weight=alpha)
    session.stack.objective = single
    total = 0.0
    for k in range(3):
        turned = random_rows()
        turned.columns["negatives"] = [texts[k:] + texts[:k] for texts in rows.columns["negatives"]]
        total += float(session.loss(batch_of(session, turned)).sum) / 3
    assert float(whole.sum) == pytest.approx(total, rel=1e-5)
    if alpha == 1.0:
        wanted = 0.0
        for index in range(4):
            chosen, rejected, _, _ = rho_of(session, rows, index, listed=3)
            wanted += np.mean([np.log1p(np.exp(-0.4 * (chosen - r))) for r in rejected])
        assert float(whole.sum) == pytest.approx(wanted, rel=1e-4)


def test_gradient_on_the_chosen_answer_is_the_mean_of_the_pair_gradients():
    def gradient(objective, rows):
        session = moved_session(objective)
        session.loss(batch_of(session, rows)).sum.backward()
        return session.model.lm_head.weight.grad

    rows = random_rows()
    whole = gradient(DPO(rejected_from="negatives", negatives=2), rows)
    parts = []
    for k in range(2):
        turned = random_rows()
        turned.columns["negatives"] = [texts[k:] + texts[:k] for texts in rows.columns["negatives"]]
        parts.append(gradient(DPO(rejected_from="negatives", negatives=1), turned))
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, atol=1e-6, rtol=1e-4)


def test_at_the_start_the_margin_is_zero_and_training_raises_it():
    session = make_session(objective=DPO(beta=0.5))
    records = []
    rows = random_rows()
    Trainer(session, rows, settings(epochs=6), observe=lambda e, v: records.append(v) if e == "step" else None).run()
    assert records[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert records[0]["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert records[-1]["chosen_reward"] - records[-1]["rejected_reward"] > 0.1
    assert records[-1]["loss"] < np.log(2)


def test_scores_of_the_reference_are_computed_once(tmp_path, monkeypatch):
    session = moved_session(DPO())
    session._scores = ReferenceScores("x", store=Store(tmp_path))
    rows = random_rows()
    first = session.loss(batch_of(session, rows)).sum
    session._models["reference"] = None  # from here on only what is kept can answer
    assert float(session.loss(batch_of(session, rows)).sum) == float(first)


def test_with_plain_likelihood_beside_it_as_one_objective():
    from luthier.engine.stack import WeightedSum

    session = moved_session(DPO())
    rows = random_rows()
    batch = batch_of(session, rows)
    session.totals = {"token": float(batch.weight_N.sum()), "sequence": 4.0}
    dpo, sft = session.loss(batch), -session.forward(batch).logp_N.sum()
    session.stack.objective = WeightedSum([("dpo", DPO(), 1.0), ("sft", SupervisedFineTuning(), 0.2)])
    both = session.loss(batch)
    wanted = float(dpo.sum) / 4 + 0.2 * float(sft) / float(batch.weight_N.sum())
    assert float(both.sum / both.weight) == pytest.approx(wanted, rel=1e-5)


def test_refusals():
    rows = random_rows()
    rows.columns["rejected_ids"] = [None] * len(rows)
    session = make_session(objective=DPO())
    with pytest.raises(UserError, match="a row has no rejected answer"):
        session.loss(batch_of(session, rows))
    session = make_session(objective=DPO(rejected_from="negatives", negatives=7))
    with pytest.raises(UserError, match="has 4 negatives, 7 are needed"):
        session.loss(batch_of(session, random_rows()))
    rows = random_rows()
    rows.columns["negatives"][1] = rows.columns["negatives"][1][:2]
    session = make_session(objective=DPO(rejected_from="negatives"))
    with pytest.raises(UserError, match="different numbers of negatives"):
        session.loss(batch_of(session, rows))
    corrupted = MaskedThought(rate_max=0.9, rate_schedule="constant", mask_token="pad")
    session = make_session(objective=DPO(), transforms=[corrupted])
    with pytest.raises(UserError, match="changed the chosen answers"):
        session.loss(corrupted(batch_of(session, random_rows()), session))
    for options, message in (
        ({"loss": "ipo", "flipped": 0.1}, "flipped is for"),
        ({"negatives": 2}, "counts those of"),
    ):
        with pytest.raises(UserError, match=message):
            DPO(**options)
