"""What exits are worth, against the model's own blocks, norm and head applied by hand in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from finished_runs import Context, finished

from helpers import tiny_llama
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.methods.analysis.sorted_ft import Exits, leaving


def by_hand(model, ids, start, exit, depth=2):
    """(log-probabilities [n, V] of the exit, raw hidden states [n, H]) at the positions before the targets, float64."""
    model.eval()
    with torch.no_grad():
        states = model.model(input_ids=torch.from_numpy(ids).long()[None], output_hidden_states=True).hidden_states
    weight = model.model.norm.weight.detach().double()
    if exit < depth:
        raw = states[exit][0].double()
        normed = raw / torch.sqrt(raw.square().mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight
    else:
        normed = states[-1][0].double()
        raw = normed / weight  # the raw states but for a factor, of which cosines know nothing
    logits = normed @ model.lm_head.weight.detach().double().T
    return logits.log_softmax(-1)[start - 1 : -1].numpy(), raw[start - 1 : -1].numpy()


def expected(model, source, exit):
    values = {name: [] for name in ("loss", "accuracy", "agreement with the whole", "KL(whole|exit)", "cosine")}
    for ids, (start, _) in zip(source.memory.ids, source.memory.spans, strict=True):
        (own, h), (whole, k) = by_hand(model, ids, start, exit), by_hand(model, ids, start, 2)
        targets = ids[start:]
        values["loss"] += (-own[np.arange(len(targets)), targets]).tolist()
        values["accuracy"] += (own.argmax(1) == targets).tolist()
        values["agreement with the whole"] += (own.argmax(1) == whole.argmax(1)).tolist()
        values["KL(whole|exit)"] += (np.exp(whole) * (whole - own)).sum(1).tolist()
        values["cosine"] += ((h * k).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(k, axis=1)).tolist()
    return values


def test_both_models_at_both_exits_against_numpy():
    base, tuned = tiny_llama(0), tiny_llama(1)
    with torch.no_grad():  # a norm that is not all ones, so that leaving it out would show
        for model in (base, tuned):
            model.model.norm.weight.copy_(torch.linspace(0.5, 2.0, 16))
    ctx = Context(base)
    table = registry.get("analysis", "sorted-ft").build({}).run([finished(tuned)], ctx)
    json.dumps(table.rows, allow_nan=False)
    found = {row[1:4]: row[4:] for row in table.rows}
    for name, model in (("base", base), ("tuned", tuned)):
        for n in (1, 2):
            values = expected(model, ctx.data.test, n)
            for quantity in ("loss", "accuracy", "agreement with the whole", "KL(whole|exit)"):
                value, count, *_ = found[name, n, quantity]
                assert value == pytest.approx(np.mean(values[quantity]), abs=2e-5), quantity
                assert count == len(values["loss"])
            assert found[name, n, "cosine with the whole"][0] == pytest.approx(np.mean(values["cosine"]), abs=1e-5)
            assert found[name, n, "perplexity"][0] == pytest.approx(math.exp(np.mean(values["loss"])), rel=1e-4)
        assert found[name, 2, "agreement with the whole"][0] == 1.0
        assert found[name, 2, "KL(whole|exit)"][0] == pytest.approx(0.0, abs=1e-7)
        assert found[name, 2, "cosine with the whole"][0] == pytest.approx(1.0, abs=1e-6)
        value, _, low, high, unit = found[name, 1, "KL(whole|exit)"]
        assert (low < value < high, unit) == (True, "nats")


def test_positions_are_bounded_and_spaced():
    ctx = Context(tiny_llama())
    table = Exits(exits=[1], positions=3).run([finished(tiny_llama(1))], ctx)
    assert {row[5] for row in table.rows} == {6}  # two batches of three
    assert {row[2] for row in table.rows} == {1, 2}  # the whole model is always there


def test_exits_that_the_run_trained_are_taken():
    tuned = tiny_llama(1)
    tuned.config.sorted_exits = [1, 2]
    assert Exits()._exits(tuned) == (1, 2)
    assert Exits(exits=[2])._exits(tuned) == (2,)
    with pytest.raises(UserError, match="no block 3: the model has 2"):
        Exits(exits=[3])._exits(tuned)
    with pytest.raises(UserError, match="increase strictly"):
        Exits(exits=[2, 1])


def test_what_leaves_a_block_is_seen_only_meanwhile():
    block = torch.nn.Linear(2, 2)
    with leaving(block) as seen:
        out = block(torch.ones(1, 2))
    assert seen[0] is out
    block(torch.zeros(1, 2))
    assert seen[0] is out
    assert not block._forward_hooks
