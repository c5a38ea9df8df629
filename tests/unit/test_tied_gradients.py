"""Tied embeddings give their gradient by rows in training: the same numbers, whoever forms the head's gradient."""

import pytest
import torch

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.protocols import Loss, Needs
from luthier.engine.loop import Trainer
from luthier.methods.objectives.sft import SupervisedFineTuning


class Joined(SupervisedFineTuning):
    """Plain SFT that says it may join positions, so that autograd goes through the head."""

    needs = Needs(statistics=("logp",))


class HiddenOnly:
    """A loss that never reaches the output layer."""

    needs = Needs(hidden=True)

    def loss(self, out, batch, ctx):
        return Loss(sum=out.hidden().square().sum(), weight=batch.weight_N.sum())


def trained(objective, *, tied=True, **values):
    session = make_session(tiny_llama(tied=tied), seed=0, objective=objective)
    Trainer(session, random_rows(), settings(epochs=2, **values)).run()
    return session


def test_positionwise_and_joined_are_one_trajectory_bit_for_bit():
    one, other = trained(SupervisedFineTuning()), trained(Joined())
    for name, value in weights(one.model).items():
        assert torch.equal(value, weights(other.model)[name]), name


def test_it_is_the_gradient_of_the_dense_embedding():
    session = make_session(tiny_llama(tied=True), seed=0)
    rows = random_rows(6)
    batch = session.task.collate(rows.fetch(range(6)), range(6))
    session.loss(batch).sum.backward()
    found = session.model.get_input_embeddings().weight.grad
    model = tiny_llama(tied=True)
    states = model.model(**batch.inputs, use_cache=False).last_hidden_state.reshape(-1, 16)[batch.position_N]
    torch.nn.functional.cross_entropy(model.lm_head(states), batch.target_N, reduction="sum").backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad)
    assert not session.model.get_input_embeddings().sparse


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_loss_that_does_not_reach_the_output_layer_still_trains_the_embedding(accumulation):
    session = trained(HiddenOnly(), accumulation=accumulation, max_steps=2)
    before = tiny_llama(tied=True).get_input_embeddings().weight
    assert not torch.equal(session.model.get_input_embeddings().weight, before)
