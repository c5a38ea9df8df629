"""The contrast of sentences in numbers worked out by hand or with numpy, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from luthier.functional.sentence_contrast import contrast_logits, contrast_loss, has_dropout, pooled


def by_hand(first, second, tau, weight):
    """The formula of the specification, with loops."""
    total = 0.0
    for i in range(len(first)):
        cosine = [
            float(np.dot(first[i], second[j]) / (np.linalg.norm(first[i]) * np.linalg.norm(second[j])))
            for j in range(len(first))
        ]
        e = [math.exp(c / tau) for c in cosine]
        total += weight[i] * -math.log(e[i] / sum(e))
    return total


def test_the_loss_is_the_closed_form():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    for tau in (0.05, 1.0):
        for weight in ([1, 1, 1, 1], [2.0, 0.0, 1.0, 0.5]):
            logits = contrast_logits(torch.tensor(first), torch.tensor(second), tau)
            found = contrast_loss(logits, torch.tensor(weight))
            assert found.item() == pytest.approx(by_hand(first, second, tau, weight), rel=1e-12)


def test_two_sentences_at_right_angles():
    eye = torch.eye(2, dtype=torch.float64)
    # The own cosine is 1, the other 0: -log(e^(1/tau) / (e^(1/tau) + 1)) for each of two sentences.
    found = contrast_loss(contrast_logits(3.0 * eye, 0.2 * eye, 0.5), torch.ones(2))
    assert found.item() == pytest.approx(2 * math.log1p(math.exp(-2)), abs=1e-14)


def test_one_sentence_has_no_negative():
    with pytest.raises(ValueError, match="at least two sentences"):
        contrast_loss(torch.zeros(1, 1), torch.ones(1))


def test_pooling_leaves_padding_out():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[5.0, 5.0], [1.0, 0.0], [0.0, 1.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pooled(hidden, mask, "mean").tolist() == [[2.0, 4.0], [2.0, 2.0]]
    assert pooled(hidden, mask, "first").tolist() == [[1.0, 2.0], [5.0, 5.0]]


@pytest.mark.parametrize(("inside", "attention"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_dropout_is_found_in_modules_and_in_attention(inside, attention):
    config = BertConfig(
        vocab_size=8,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
        hidden_dropout_prob=inside,
        attention_probs_dropout_prob=attention,
    )
    assert has_dropout(BertModel(config)) is (inside > 0 or attention > 0)
