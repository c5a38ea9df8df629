"""Firmness: wordings and contrary tuning on small models, the twin's shift against hooks and derivatives by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import Context, finished

from helpers import tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.functional.sweeps import grid
from luthier.methods.analysis.learning_from_undesirable import Firmness, contradicting, half_life

NOTHING = {"alphas": [], "answers": False}


def measured(ctx, tuned, **options):
    table = registry.get("analysis", "learning-from-undesirable").build(options).run([finished(tuned)], ctx)
    json.dumps([table.rows, table.notes], allow_nan=False)
    return {row[1:4]: row[4:] for row in table.rows}, table


def loss_of(model, rows):
    """Mean loss over all targets of (prompt ids, answer ids), each row alone, in float64."""
    losses = []
    for prompt, answer in rows:
        ids = torch.tensor([[1, *prompt, *answer, 2]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = 1 + len(prompt)
        losses += (-logp[start - 1 : -1].gather(1, ids[0, start:, None]).squeeze(1)).tolist()
    return losses


def texts(source):
    rows = [source.canonical(i) for i in range(len(source))]
    return [([*map(int, r["prompt"].split())], [*map(int, r["completion"].split())]) for r in rows]


def test_wordings_against_the_models_by_hand():
    base, tuned = tiny_llama(0), tiny_llama(1)
    ctx = Context(base)
    found, _ = measured(ctx, tuned, templates=["{prompt}", "50 {prompt} 51"], rows=6, **NOTHING)
    for name, model in (("base", base), ("tuned", tuned)):
        plain = np.mean(loss_of(model, texts(ctx.data.test)))
        other = np.mean(loss_of(model, [([50, *p, 51], a) for p, a in texts(ctx.data.test)]))
        assert found[name, "loss", "wording '{prompt}'"][0] == pytest.approx(plain, abs=1e-5)
        assert found[name, "loss", "wording '50 {prompt} 51'"][0] == pytest.approx(other, abs=1e-5)
        assert found[name, "loss", "mean over wordings"][:2] == (pytest.approx((plain + other) / 2, abs=1e-5), 2)
        assert found[name, "loss", "deviation over wordings"][0] == pytest.approx(abs(plain - other) / 2, abs=1e-5)


def test_a_pattern_takes_questions_apart_and_what_it_does_not_match_is_counted():
    ctx = Context(tiny_llama())
    whole = [len(p) for p, _ in texts(ctx.data.test)]
    pattern = r"(?P<first>\d+) (?P<rest>.*)"
    found, table = measured(ctx, tiny_llama(1), templates=["{rest} {first}", "{first}"], pattern=pattern, **NOTHING)
    short = sum(n < 2 for n in whole)
    assert (f"does not match {short} of 6" in " ".join(table.notes)) == (short > 0)
    kept = [(p, a) for p, a in texts(ctx.data.test) if len(p) > 1]
    expected = np.mean(loss_of(ctx.base.model, [([*p[1:], p[0]], a) for p, a in kept]))
    assert found["base", "loss", "wording '{rest} {first}'"][0] == pytest.approx(expected, abs=1e-5)


class Talking:
    """A session that answers from a list, first of all rightly."""

    def __init__(self, ctx, model):
        self.inner = ctx.base if model is None else model
        self.model, self.render, self.evaluate_batch = self.inner.model, self.inner.render, self.inner.evaluate_batch

    def generate(self, rows):
        return [[SimpleNamespace(text=row["completion"])] for row in rows]


def test_right_answers_by_the_runs_verifier():
    ctx = Context(tiny_llama())
    ctx.base = Talking(ctx, None)
    ctx.verifier = lambda rows, said, _: [float(r["completion"] == s) for r, s in zip(rows, said, strict=True)]
    found, _ = measured(ctx, ctx.base, templates=["{prompt}", "7 {prompt}"], alphas=[])
    assert found["base", "right answers", "wording '7 {prompt}'"][:2] == (1.0, 6)
    assert found["base", "right answers", "deviation over wordings"][0] == 0.0


def row(number, completion, **extra):
    return {"kind": "pair", "source": "f", "row": number, "prompt": "p", "completion": completion,
            "extra": json.dumps(extra)}  # fmt: skip


def test_contradicting_answers():
    rows = [row(1, "a"), row(2, "a "), row(3, "b"), row(4, "c")]
    assert [r["completion"] for r in contradicting(rows, "shuffled")] == ["b", "b", "c", "a"]
    named = [row(1, "a", wrong="x"), row(2, "b", wrong="y")]
    assert [r["completion"] for r in contradicting(named, "wrong")] == ["x", "y"]
    with pytest.raises(UserError, match="no text in a column 'wrong'") as problem:
        contradicting([row(1, "a", wrong="x"), row(2, "b")], "wrong")
    assert problem.value.where == "f, row 2"
    with pytest.raises(UserError, match="all training rows have one answer"):
        contradicting([row(1, "a"), row(2, "a")], "shuffled")
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]
    chats = [{**row(i, None), "kind": "chat", "messages": json.dumps([talk[0], {**talk[1], "content": c}])}
             for i, c in enumerate("vw")]  # fmt: skip
    assert [json.loads(r["messages"])[-1]["content"] for r in contradicting(chats, "shuffled")] == ["w", "v"]


def test_half_of_the_first_score():
    assert half_life([(0, 0.8), (5, 0.4), (10, 0.39)]) == 10
    assert half_life([(0, 0.8), (5, 0.4)]) is None
    assert half_life([(0, 0.0), (5, 0.0)]) is None


def test_contrary_tuning_works_on_a_copy_and_raises_the_loss_of_the_wanted_answers():
    tuned, ctx = tiny_llama(1), Context(tiny_llama())
    before = weights(tuned)
    options = {"contrary": "shuffled", "steps": 12, "every": 6, "learning_rate": 1e-2, "batch_rows": 4, **NOTHING}
    found, _ = measured(ctx, tuned, **options)
    assert [k[2] for k in found] == [f"contrary tuning, step {n}" for n in (0, 6, 12)]
    start = found["tuned", "loss", "contrary tuning, step 0"][0]
    assert start == pytest.approx(np.mean(loss_of(tuned, texts(ctx.data.test))), abs=1e-5)
    again, _ = measured(ctx, tuned, **options)
    assert again == found  # a function of the seed alone
    other, _ = measured(ctx, tuned, **options, seed=1)
    assert other["tuned", "loss", "contrary tuning, step 12"] != found["tuned", "loss", "contrary tuning, step 12"]
    for name, value in weights(tuned).items():
        assert torch.equal(value, before[name])


class Taught(list):
    """Given canonical rows."""

    def canonical(self, index):
        return self[index]


def test_contrary_tuning_teaches_the_contrary():
    tuned, ctx = tiny_llama(1), Context(tiny_llama())
    options = {"contrary": "shuffled", "steps": 60, "every": 60, "learning_rate": 1e-2, "batch_rows": 12, "rows": 12}
    wanted = ctx.data.test = ctx.data.train
    made = contradicting([wanted.canonical(i) for i in range(len(wanted))], "shuffled")
    after = {}
    for name in ("wanted", "taught"):
        if name == "taught":
            ctx.data.test = SimpleNamespace(prepared=Taught(made))
        found, _ = measured(ctx, tuned, **options, **NOTHING)
        after[name] = found["tuned", "loss", "contrary tuning, step 60"][0]
    assert after["taught"] < after["wanted"] - 0.5


def test_the_twins_shift_by_hand():
    """With vectors on the blocks: the gradient of the mean loss at zero, one step of length alpha along it, by hooks."""
    model, alpha = tiny_llama(0), 0.05
    ctx = Context(model, rows=4, batch_rows=4)
    found, _ = measured(ctx, tiny_llama(1), aux="steer", alphas=[0.0, alpha], answers=False, rows=4)
    batch = ctx.base.render([ctx.data.test.canonical(i) for i in range(4)])
    blocks = model.model.layers

    def states(vectors):
        seen, handles = [], []
        for block, vector in zip(blocks, vectors, strict=True):

            def add(module, inputs, out, vector=vector):
                out = out[0] if isinstance(out, tuple) else out
                seen.append(out + vector)
                return seen[-1]

            handles.append(block.register_forward_hook(add))
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.position_N]
        for handle in handles:
            handle.remove()
        return seen, torch.nn.functional.cross_entropy(logits, batch.target_N)

    zeros = [torch.zeros(16, requires_grad=True) for _ in blocks]
    own, loss = states(zeros)
    gradients = torch.autograd.grad(loss, zeros)
    length = torch.cat(gradients).norm()
    mask = batch.inputs["attention_mask"].bool()
    scale = torch.stack([(s.norm(dim=-1) * mask).sum() / mask.sum() for s in own]).mean()
    moved, worse = states([alpha * scale * g / length for g in gradients])
    for number, (h, other) in enumerate(zip(own, moved, strict=True), 1):
        apart, size = (h - other).square().sum(-1) * mask, h.square().sum(-1) * mask
        rows = apart.sum(1) / size.sum(1)
        name = f"block {number}, alpha 0.05"
        assert found["base", "shift of the twin", name][0] == pytest.approx(
            float(rows.mean().sqrt().detach()), rel=1e-4
        )
        assert found["base", "shift of the twin", f"block {number}, alpha 0"][0] == 0.0
    above = found["base", "loss of the twin above its own", "alpha 0.05"][0]
    assert above == pytest.approx(float((worse - loss).detach()), abs=1e-5)
    assert above > 0
    assert found["base", "loss of the twin above its own", "alpha 0"][0] == pytest.approx(0.0, abs=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_without_held_out_rows_says_so():
    ctx = Context(tiny_llama())
    ctx.data.test = None
    _, table = measured(ctx, tiny_llama(1))
    assert table.rows == ()
    assert "one: there are no held-out rows" in table.notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "("}, r"is no regular expression"),
        ({"templates": ["{prompt}", "{word}"]}, r"names what the pattern has not .*its groups: \{prompt\}"),
        ({"templates": ["{prompt}", "{0}"]}, r"names what the pattern has not"),
        ({"pattern": ".*", "templates": ["a", "{prompt}"]}, "its groups: none"),
    ],
)
def test_patterns_and_templates_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        Firmness(**options)


def test_a_grid_of_overrides():
    found = list(grid("runs/sweep", {"objective.x.alpha": [0.1, 0.5], "training.epochs": [1.0]}))
    assert found == [
        ["objective.x.alpha=0.1", "training.epochs=1.0", "output=runs/sweep/alpha=0.1,epochs=1.0"],
        ["objective.x.alpha=0.5", "training.epochs=1.0", "output=runs/sweep/alpha=0.5,epochs=1.0"],
    ]
    with pytest.raises(ValueError, match=re.escape("no values for objective.x.alpha")):
        list(grid("runs", {"objective.x.alpha": []}))
    assert len({Path(one[-1]) for one in grid("r", {"a.b": [1, 2], "a.c": [1, 2, 3]})}) == 6
