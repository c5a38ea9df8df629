"""Terms that methods add to the loss: each a mean over its own count, kept once under checkpointing and accumulation."""

from __future__ import annotations

import pytest
import torch

from helpers import OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Loss
from luthier.engine.loop import Trainer
from luthier.engine.stack import WeightedSum
from luthier.functional.recording import recording
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.recipe.load import load
from luthier.recipe.plan import plan


class Penalised(OpenAll):
    """Full fine-tuning with the mean square of each block's MLP output, per example, as a further term."""

    factor = 0.5

    def apply(self, model, ctx):
        self.kept = []
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda m, _, out: self.kept.append(out) if recording(m) else None)
        return super().apply(model, ctx)

    def counts(self, batch, ctx):
        return {"examples": batch.examples}

    def auxiliary(self, model, batch, ctx):
        kept, self.kept = self.kept, []
        assert len(kept) == 2, "once per layer and micro-batch"
        mask_BT1 = batch.inputs["attention_mask"][..., None]
        per_example_B = sum(((out_BTH * mask_BT1) ** 2).sum((1, 2)) for out_BTH in kept)
        return Loss(sum=self.factor * per_example_B.sum(), weight=batch.examples, unit="examples")


def trained(*, checkpointing=False, **values):
    session = make_session(parameters=[Penalised()])
    if checkpointing:
        session.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    records = []
    training = settings(optimizer="sgd", schedule="constant", max_steps=3, **values)
    Trainer(session, random_rows(), training, observe=lambda e, r: records.append(r) if e == "step" else None).run()
    return weights(session.model), records


def test_the_gradient_is_that_of_both_means_written_out():
    data, method = random_rows(8), Penalised()
    session = make_session(parameters=[method])
    Trainer(
        session, data, settings(optimizer="sgd", beta1=0.0, learning_rate=1.0, schedule="constant", max_steps=1)
    ).run()
    model = tiny_llama()
    kept = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, _, out: kept.append(out))
    batch = session.task.collate(data.fetch(range(8)), range(8))
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.position_N]
    mask_BT1 = batch.inputs["attention_mask"][..., None]
    penalty = sum(((out * mask_BT1) ** 2).sum() for out in kept) / 8
    loss = torch.nn.functional.cross_entropy(logits, batch.target_N) + 0.5 * penalty
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    after = weights(session.model)
    for name, parameter in model.named_parameters():
        step = parameter.grad * min(1.0, float(1.0 / norm))
        torch.testing.assert_close(after[name], parameter.detach() - step, atol=2e-6, rtol=1e-4)


def test_checkpointing_and_accumulation_change_nothing():
    plain, records = trained(accumulation=1)
    assert records[0]["loss"] > records[0]["nll"]
    assert records[0]["parameters#0/loss"] > 0
    for other, _ in (trained(accumulation=4), trained(checkpointing=True), trained(checkpointing=True, accumulation=2)):
        for name, value in plain.items():
            torch.testing.assert_close(other[name], value, atol=2e-6, rtol=1e-4)


def test_beside_a_weighted_sum():
    both = WeightedSum([("a", SupervisedFineTuning(), 0.25), ("b", SupervisedFineTuning(), 0.75)])
    found = []
    for objective in (SupervisedFineTuning(), both):
        session = make_session(objective=objective, parameters=[Penalised()])
        Trainer(session, random_rows(), settings(optimizer="sgd", max_steps=2)).run()
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-6, rtol=1e-4)


def test_a_unit_without_a_total_is_named():
    with pytest.raises(LuthierError, match="'x' adds to a loss that counts in 'apples'"):
        Loss(torch.zeros(()), 1.0).plus(Loss(torch.ones(()), 1.0, unit="apples"), {"token": 3.0}, "x")


def test_no_term_beside_a_divisor_that_the_model_decides(tmp_path):
    (tmp_path / "own.py").write_text(
        "class Own:\n    def auxiliary(self, model, batch, ctx): ...\n"
        "class Loss_:\n    from luthier.core.protocols import Needs\n    needs = Needs(fixed_weight=False)\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "luthier: 1\nmodel: lab:nano\ndata: {train: lab:arithmetic}\n"
        "objective: ./own.py:Loss_\nparameters: [./own.py:Own]\noutput: runs/x\n"
    )
    with pytest.raises(UserError, match=r"divides by a count that depends on the model.*cannot add a term"):
        plan(load(tmp_path / "recipe.yaml"))
