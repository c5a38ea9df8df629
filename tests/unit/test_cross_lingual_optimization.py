"""Cross-lingual optimization against float64 and trl: both terms, both directions, the step's counts, what is refused."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from discriminative_rows import PairRows, pair_session, random_pairs, rendered

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.methods.objectives.cross_lingual_optimization import CrossLingualOptimization, margin, preference_loss
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.parameters.attention import AttentionOnly
from luthier.methods.parameters.lora import LowRankAdaptation

# Log-probabilities of two examples: (x_en,y_en), (x_en,y_l), (x_l,y_l), (x_l,y_en).
POLICY = np.array([[-7.5, -11.25, -9.0, -8.5], [-3.0, -6.5, -12.0, -4.25]])
REFERENCE = np.array([[-8.0, -10.0, -9.5, -7.5], [-3.5, -6.0, -13.0, -4.0]])


def minus_log_sigmoid(x):
    return np.log1p(np.exp(-np.asarray(x)))


def tensors(columns):
    return [torch.tensor(x) for x in columns]


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_preference_on_given_numbers_against_float64_and_trl(beta):
    for chosen, rejected in ((0, 1), (2, 3)):
        p, r = POLICY[:, [chosen, rejected]].T, REFERENCE[:, [chosen, rejected]].T
        wanted = minus_log_sigmoid(beta * ((p[0] - r[0]) - (p[1] - r[1])))
        found = preference_loss(margin(*tensors(p), *tensors(r), beta))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
        assert float(found.mean()) == pytest.approx(trl_loss(p, r, beta), rel=1e-12)


def trl_loss(policy, reference, beta):
    """What trl's own trainer makes of sequences of one completion token each: mean over the rows of one direction."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    logp = torch.tensor(np.concatenate(policy))[:, None]
    # Besides log-probabilities it reads statistics for its log, which do not enter the loss.
    nothing = torch.zeros_like(logp)
    made = SimpleNamespace(log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x), f_divergence_type="reverse_kl",
        loss_types=["sigmoid"], loss_weights=[1.0], beta=beta, use_weighting=False, label_smoothing=0.0,
        _metrics=defaultdict(lambda: defaultdict(list)), _tp_size=1, _total_train_tokens=0,
    )  # fmt: skip
    count = len(logp)
    inputs = {
        "input_ids": torch.zeros(count, 2, dtype=torch.long),
        "attention_mask": torch.ones(count, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * count),
        "ref_chosen_logps": torch.tensor(reference[0]),
        "ref_rejected_logps": torch.tensor(reference[1]),
    }
    return float(dpo.DPOTrainer._compute_loss(trainer, lambda **_: made, inputs, return_outputs=False))


# -- in a session


def paired(count=8, *, seed=0, language=None, together=True):
    """Random pairs, each with random texts in the place of the other language."""
    other = random_pairs(count, seed=seed + 100).pairs
    rows = []
    for own, english in zip(random_pairs(count, seed=seed).pairs, other, strict=True):
        row = {"prompt": own["prompt"], "completion": own["completion"], "other_answer": english["completion"]}
        row["english_prompt"] = english["prompt"] if together else None
        row["prompt_language"] = language[len(rows)] if language else None
        rows.append(row)
    return PairRows(rows)


def numpy_logp(model, prompt, answer):
    """(summed log-probability of the answer in float64, its tokens)."""
    ids, (start, end) = rendered({"prompt": prompt, "completion": answer})
    with torch.no_grad():
        logp = torch.log_softmax(model.double()(input_ids=torch.tensor([ids])).logits[0], dim=-1).numpy()
    model.float()
    return sum(logp[t - 1, ids[t]] for t in range(start, end)), end - start


def directions(row):
    """(direction, prompt, chosen, rejected), as the specification builds them."""
    own = (row["prompt_language"] or "target", row["prompt"], row["completion"], row["other_answer"])
    if row["english_prompt"] is None:
        return [own]
    return [own, ("english", row["english_prompt"], row["other_answer"], row["completion"])]


def formula(
    model, base, rows, *, sft_weight=0.5, beta=0.1, half=False, factors=(1.0, 1.0), nll_on="target", norm=False
):
    """L of the specification over these rows, in float64."""
    losses, nll, tokens = {"english": [], "target": []}, 0.0, 0
    for row in rows:
        for name, prompt, chosen, rejected in directions(row):
            found = [[numpy_logp(m, prompt, text) for text in (chosen, rejected)] for m in (model, base)]
            if nll_on in ("both", name):
                nll, tokens = nll - found[0][0][0], tokens + found[0][0][1]
            (c, r), (c0, r0) = [[lp / (n if norm else 1) for lp, n in some] for some in found]
            losses[name].append(minus_log_sigmoid(beta * ((c - c0) - (r - r0))))
    weighted = zip(factors, (losses["english"], losses["target"]), strict=True)
    preference = sum(f * np.mean(some) for f, some in weighted if some)
    return sft_weight * (nll / tokens if tokens else 0.0) + (1 - sft_weight) * preference * (0.5 if half else 1.0)


def loss_of(session, batch):
    session.totals = session.stack.counts([batch], session)
    return session.loss(batch)


def session_and_loss(method, rows, index, *, move=True):
    session = pair_session(method)
    session.model.train()
    method.prepare(session, rows)
    if move:  # the model moves, the reference does not
        with torch.no_grad():
            session.model.lm_head.weight.mul_(1.3)
    batch = session.task.collate(rows.fetch(index), index, session.stack.needs.columns)
    return session, loss_of(session, batch)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, {}),
        ({"sft_weight": 0.0, "beta": 0.7}, {"sft_weight": 0.0, "beta": 0.7}),
        ({"cl_reduction": "mean", "cl_weight_en": 0.25, "cl_weight_tgt": 2.0}, {"half": True, "factors": (0.25, 2.0)}),
        ({"nll_on": "both", "sft_weight": 0.8}, {"nll_on": "both", "sft_weight": 0.8}),
        ({"nll_on": "both", "sft_weight": 1.0}, {"nll_on": "both", "sft_weight": 1.0}),
        ({"nll_on": "none"}, {"nll_on": "none"}),
        ({"length_normalise": True, "beta": 2.0}, {"norm": True, "beta": 2.0}),
    ],
    ids=str,
)
def test_loss_of_a_session_against_float64(options, numbers):
    rows, index = paired(), [5, 2, 7]
    session, loss = session_and_loss(CrossLingualOptimization(**options), rows, index)
    wanted = formula(session.model, tiny_llama(), [rows.pairs[i] for i in index], **numbers)
    assert float(loss.sum.detach()) / float(loss.weight) == pytest.approx(wanted, rel=2e-5)


def test_rows_of_one_direction_and_a_missing_direction():
    method = CrossLingualOptimization()
    for languages in (["english", None, "target", "english"], ["target"] * 4, ["english"] * 4):
        rows = paired(4, language=languages, together=False)
        session, loss = session_and_loss(method, rows, range(4))
        wanted = formula(session.model, tiny_llama(), rows.pairs)
        assert float(loss.sum.detach()) / float(loss.weight) == pytest.approx(wanted, rel=2e-5)
        assert math.isfinite(float(loss.sum.detach()))
        assert ("margin_target" in loss.metrics) == ("target" in languages or None in languages)


def test_start_has_no_margin_two_log_two_and_a_gradient():
    rows = paired()
    session, loss = session_and_loss(CrossLingualOptimization(sft_weight=0.0), rows, range(8), move=False)
    assert float(loss.sum.detach()) / float(loss.weight) == pytest.approx(2 * math.log(2), rel=1e-6)
    for name in ("english", "target"):
        value, count = loss.metrics[f"margin_{name}"]
        assert float(value) == pytest.approx(0.0, abs=1e-5)
        assert float(count) == 8
    loss.sum.backward()
    assert max(float(p.grad.abs().max()) for p in session.model.parameters()) > 1e-3


def test_metrics_tell_lengths_and_likelihoods_apart():
    rows, index = paired(), [0, 3]
    session, loss = session_and_loss(CrossLingualOptimization(), rows, index)
    pairs = [rows.pairs[i] for i in index]
    for name, texts in (
        ("target", [(r["prompt"], r["completion"]) for r in pairs]),
        ("english", [(r["english_prompt"], r["other_answer"]) for r in pairs]),
    ):
        found = [numpy_logp(session.model, *text) for text in texts]
        value, tokens = loss.metrics[f"nll_chosen_{name}"]
        assert float(value) == pytest.approx(-sum(lp for lp, _ in found), rel=1e-5)
        assert float(tokens) == float(loss.metrics[f"tokens_{name}"][0]) == sum(n for _, n in found)


def test_english_answers_do_not_enter_the_likelihood_term():
    found = []
    for answer in ("5 6 7", "40 41 42 43 44"):
        rows = PairRows([{**row, "other_answer": answer} for row in paired(4).pairs])
        # beta so small that the preference is flat: what is left is the likelihood.
        _, loss = session_and_loss(CrossLingualOptimization(beta=1e-9), rows, range(4))
        found.append((float(loss.sum.detach()) / float(loss.weight), float(loss.metrics["nll_chosen_english"][0])))
        loss.sum.backward()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] != pytest.approx(found[1][1], rel=1e-2)


def trained(method, rows, **values):
    session = pair_session(method)
    training = settings(**{"epochs": 2, "optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant", **values})
    Trainer(session, rows, training).run()
    return session


def assert_near(a, b):
    for name, value in weights(a.model).items():
        torch.testing.assert_close(weights(b.model)[name], value, atol=2e-5, rtol=1e-3)


def test_accumulation_gives_the_same_steps():
    rows = paired(21)
    assert_near(*(trained(CrossLingualOptimization(), rows, accumulation=n) for n in (1, 4)))


def test_adapters_are_compared_with_the_base_beneath_them():
    method, records = CrossLingualOptimization(beta=1.0), []
    attention = LowRankAdaptation(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    session = make_session(objective=method, parameters=[attention])
    assert "reference" not in session._models
    Trainer(session, paired(8), settings(epochs=20, learning_rate=5e-2), observe=lambda e, r: records.append(r)).run()
    assert records[0]["margin_target"] == pytest.approx(0.0, abs=1e-5)
    first, last = (r["preference_english"] + r["preference_target"] for r in (records[0], records[-1]))
    assert first == pytest.approx(2 * math.log(2), rel=1e-5)
    assert last < 0.8 * first


def test_lambda_one_is_plain_fine_tuning_on_the_target_rows_alone():
    languages = ["english", None, "target"] * 4
    mixed = paired(12, language=languages, together=False)
    found = trained(CrossLingualOptimization(sft_weight=1.0), mixed, batch_rows=12, accumulation=2)
    kept = PairRows([row for row in mixed.pairs if row["prompt_language"] != "english"])
    assert_near(trained(SupervisedFineTuning(), kept, batch_rows=8), found)


@pytest.mark.parametrize("nll_on", ["target", "both"])
def test_every_count_is_one_of_the_whole_step(nll_on):
    # Rows of one direction, of which the parts of a step have unequal numbers.
    apart = paired(16, language=["english", "english", "english", "target"] * 4, together=False)
    for rows in (apart, paired(9)):
        method = {"nll_on": nll_on}
        assert_near(*(trained(CrossLingualOptimization(**method), rows, accumulation=n) for n in (1, 3)))


def test_weights_of_examples_multiply_and_those_of_tokens_are_refused():
    rows, method = paired(4), CrossLingualOptimization()
    session, _ = session_and_loss(method, rows, [0, 1])
    batch = session.task.collate(rows.fetch([0, 1]), [0, 1], session.stack.needs.columns)
    only = loss_of(session, batch.with_weights((batch.sequence_N == 1).float()))
    wanted = formula(session.model, tiny_llama(), [rows.pairs[1]])
    assert float(only.sum.detach()) / float(only.weight) == pytest.approx(wanted, rel=2e-5)
    nothing = loss_of(session, batch.with_weights(torch.zeros_like(batch.weight_N)))
    nothing.sum.backward()
    assert float(nothing.sum.detach()) == 0.0
    with pytest.raises(UserError, match="weights the tokens of an answer"):
        loss_of(session, batch.with_weights(torch.arange(len(batch.weight_N)).float()))
    with pytest.raises(UserError, match="changed the inputs of one answer"):
        loss_of(session, batch.with_inputs())


def test_reference_scores_are_cached_under_all_four_sequences(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    rows, found = paired(6), []
    for _ in range(2):
        session = pair_session(CrossLingualOptimization(), fingerprint="a base")
        session.model.train()
        passes, compute = [], session._forward
        monkeypatch.setattr(
            session, "_forward", lambda b, m, *a, c=compute, p=passes: p.append((m, b.examples)) or c(b, m, *a)
        )
        with torch.no_grad():
            session.model.lm_head.weight.mul_(1.1)
        batch = session.task.collate(rows.fetch(range(6)), range(6), session.stack.needs.columns)
        found.append(
            (
                float(loss_of(session, batch).sum.detach()),
                [n for m, n in passes if m == "reference"],
                [n for m, n in passes if m == "policy"],
            )
        )
        session.close()
    assert found == [(found[0][0], [6, 18], [6, 18]), (found[0][0], [], [6, 18])]


def test_rows_without_the_other_language_are_named():
    def prepared(**row):
        method = CrossLingualOptimization()
        pairs = [{**paired(1).pairs[0], "source": "x.jsonl", **row}]
        method.prepare(pair_session(method), PairRows(pairs))

    with pytest.raises(UserError, match=r"^x\.jsonl, row 1: no answer in the other language: put the data stage"):
        prepared(other_answer=None)
    with pytest.raises(UserError, match="must be english, target or empty"):
        prepared(prompt_language="klingon")
    with pytest.raises(UserError, match="'target_language' must be a text"):
        prepared(target_language=3)
    with pytest.raises(UserError, match="only a target row may have it"):
        prepared(prompt_language="english")
    with pytest.raises(UserError, match="one question with one answer"):
        prepared(kind="text")
    with pytest.raises(UserError, match="there is no loss"):
        CrossLingualOptimization(sft_weight=1.0, nll_on="none")
    assert CrossLingualOptimization(sft_weight=1.0).needs.models == ()
    assert CrossLingualOptimization().needs.models == ("reference",)


def test_a_language_the_base_hardly_knows_asks_for_all_parameters():
    rows = paired(6)
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    session = pair_session(method := CrossLingualOptimization(), model=model)
    AttentionOnly().apply(session.model, session)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.prepare(session, rows)
    # A uniform base: (log 64 nats per token) / (characters per token), by language.
    wanted = {}
    for name, column in (("target", "completion"), ("english", "other_answer")):
        tokens = sum(len(r[column].split()) + 1 for r in rows.pairs)
        wanted[name] = math.exp(math.log(64) * tokens / sum(len(r[column]) for r in rows.pairs))
    assert method.record()["perplexity_per_character"] == pytest.approx(wanted, rel=1e-5)
    short = PairRows(
        [{**row, "completion": "5 6 7 8", "other_answer": "10 10 10 10 10 10 10 10"} for row in rows.pairs]
    )
    # 4 tokens and an end in 7 characters, 8 and an end in 23: exp(log 64 (5/7 - 9/23)) = 3.8.
    with pytest.warns(UserWarning, match=r"use parameters: \[full\]"):
        method.prepare(session, short)
    session.model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.prepare(session, short)


def test_columns_may_have_other_names():
    rows = random_rows(8)
    method = CrossLingualOptimization(other_answer="prompt", english_prompt="completion")
    _, loss = session_and_loss(method, rows, range(4), move=False)
    assert float(loss.metrics["preference_english"][1]) == 4


# -- several target languages


def in_languages(count, *languages, **options):
    rows = paired(count, **options).pairs
    return PairRows([{**row, "target_language": languages[i % len(languages)]} for i, row in enumerate(rows)])


@pytest.mark.parametrize("nll_on", ["target", "both", "none"])
def test_several_languages_share_one_mean_or_have_one_each(nll_on):
    rows, index = in_languages(8, "sw", "yo", "sw"), [0, 1, 3, 5, 6]
    chosen = [rows.pairs[i] for i in index]
    kinds = [[row for row in chosen if row["target_language"] == code] for code in ("sw", "yo")]
    assert [len(some) for some in kinds] == [4, 1]
    session, loss = session_and_loss(CrossLingualOptimization(nll_on=nll_on), rows, index)
    wanted = formula(session.model, tiny_llama(), chosen, nll_on=nll_on)
    assert float(loss.sum.detach()) / float(loss.weight) == pytest.approx(wanted, rel=2e-5)
    method = CrossLingualOptimization(nll_on=nll_on, mean_over="languages")
    session, loss = session_and_loss(method, rows, index)
    wanted = np.mean([formula(session.model, tiny_llama(), some, nll_on=nll_on) for some in kinds])
    assert float(loss.sum.detach()) / float(loss.weight) == pytest.approx(wanted, rel=2e-5)
    assert {"margin_target_sw", "margin_english_sw", "margin_target_yo", "margin_english_yo"} <= loss.metrics.keys()


def test_a_language_that_a_step_does_not_have_is_left_out_of_its_mean():
    rows, index = in_languages(6, "sw", "yo"), [0, 2]
    session, loss = session_and_loss(CrossLingualOptimization(mean_over="languages"), rows, index)
    wanted = formula(session.model, tiny_llama(), [rows.pairs[i] for i in index])
    assert float(loss.sum.detach()) / float(loss.weight) == pytest.approx(wanted, rel=2e-5)


def test_one_language_has_the_same_loss_with_either_mean():
    rows = in_languages(5, "sw")
    found = [session_and_loss(CrossLingualOptimization(mean_over=m), rows, range(5))[1] for m in ("rows", "languages")]
    assert float(found[0].sum.detach()) == pytest.approx(float(found[1].sum.detach()), rel=1e-6)


def test_accumulation_gives_the_same_steps_in_several_languages():
    rows = in_languages(12, "sw", "yo", "zh")
    assert_near(*(trained(CrossLingualOptimization(mean_over="languages"), rows, accumulation=n) for n in (1, 3)))
