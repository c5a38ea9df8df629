"""Rollouts in the engine: what is sampled, how it is judged, and how it lasts for several updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional.rollouts import advantages
from luthier.methods.objectives.grpo import GroupRelativePolicyOptimization as GRPO
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.transforms.rollouts import Rollouts

LAST = {"regex": {"pattern": "[0-4]$"}}
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}


def sessions(objective=None, lora=False, **options):
    made = Rollouts(**{"reward": LAST, "samples": 4, "max_new_tokens": 6, **options})
    parameters = [LowRankAdaptation(rank=2, target_modules=["q_proj", "v_proj"])] if lora else None
    return make_session(objective=objective or GRPO(), transforms=[made], parameters=parameters), made


def batch_of(session, rows, count=3):
    return session.task.collate(rows.fetch(range(count)), range(count), session.stack.needs.columns)


def own_reward(tmp_path, body):
    """A reward of the user's own file."""
    (tmp_path / "mine.py").write_text(f"def mine(rows, completions, ctx):\n    return {body}\n")
    return f"{tmp_path / 'mine.py'}:mine"


def test_the_sampled_tokens_are_the_targets_behind_the_prompt_of_the_row():
    session, made = sessions()
    given = batch_of(session, random_rows())
    batch = made(given, session)
    assert batch.examples == 12
    assert batch.row_B.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    prompts = [i for i in range(3) for _ in range(4)]
    starts = given.supervised_BT.int().argmax(1)
    for b, row in enumerate(prompts):
        n = int(starts[row])
        assert batch.inputs["input_ids"][b, :n].tolist() == given.inputs["input_ids"][row, :n].tolist()
        targets = batch.target_N[batch.sequence_N == b].tolist()
        ids = batch.inputs["input_ids"][b][batch.inputs["attention_mask"][b].bool()].tolist()
        assert ids[n:] == targets
        assert 1 <= len(targets) <= 6
        assert (2 in targets[:-1]) is False
    assert batch.keys_B is None
    assert given.examples == 3


def test_what_is_drawn_depends_on_step_and_row_alone():
    session, made = sessions()
    rows = random_rows()
    whole = made(batch_of(session, rows, 4), session)
    session.micro = 3
    lone = made(session.task.collate(rows.fetch([2]), [2], session.stack.needs.columns), session)
    place = torch.isin(whole.sequence_N, torch.arange(8, 12))
    assert whole.target_N[place].tolist() == lone.target_N.tolist()
    assert whole.columns["advantage_N"][place].tolist() == lone.columns["advantage_N"].tolist()
    session.step = 1
    assert made(batch_of(session, rows, 4), session).target_N.tolist() != whole.target_N.tolist()


def test_completions_are_draws_from_the_policy():
    """The frequency of each first token against the model's own probability."""
    session, made = sessions(samples=4000, max_new_tokens=1, temperature=0.7, batch_rows=4000, reward=LAST)
    rows = random_rows()
    batch = made(batch_of(session, rows, 1), session)
    prompt = batch.inputs["input_ids"][:1, :-1]
    with torch.no_grad():
        p = (session.model.eval()(prompt).logits[0, -1].double() / 0.7).softmax(-1)
    drawn = torch.bincount(batch.target_N, minlength=64) / 4000
    assert float((drawn - p).abs().max()) < 5 * (0.25 / 4000) ** 0.5


def test_advantages_of_a_group_from_its_rewards():
    session, made = sessions()
    batch = made(batch_of(session, random_rows(), 6), session)
    reward = batch.columns["reward"].view(6, 4).double().numpy()
    assert 0 < reward.mean() < 1
    said = [[t for t in batch.target_N[batch.sequence_N == b].tolist() if t > 2] for b in range(24)]
    assert [bool(ids) and ids[-1] % 10 < 5 for ids in said] == reward.reshape(-1).astype(bool).tolist()
    wanted = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, ddof=1, keepdims=True) + 1e-4)
    found = torch.zeros(24).index_reduce(0, batch.sequence_N, batch.columns["advantage_N"], "amax", include_self=False)
    np.testing.assert_allclose(found.view(6, 4), wanted, atol=1e-6)
    assert batch.columns["no_signal"].view(6, 4)[:, 0].tolist() == (reward.std(1) == 0).astype(float).tolist()


@pytest.mark.parametrize("kind", ["batch", "normalise_then_sum"])
@pytest.mark.parametrize("pieces", [((0, 1, 2, 3, 4, 5),), ((0, 1), (2, 3, 4), (5,))])
def test_the_spread_is_that_of_the_whole_step(kind, pieces):
    rewards = [LAST, {"regex": {"pattern": "1"}}] if kind == "normalise_then_sum" else LAST
    session, made = sessions(advantages=kind, reward=rewards)
    rows = random_rows()
    batches = [made(session.task.collate(rows.fetch(p), p, session.stack.needs.columns), session) for p in pieces]
    totals = session.stack.counts(batches, session)
    found = torch.cat([advantages(b, totals, "test") for b in batches])
    first = torch.cat([b.sequence_N + 4 * sum(len(q) for q in pieces[:i]) for i, b in enumerate(batches)])
    found = torch.zeros(24).index_reduce(0, first, found, "amax", include_self=False).view(6, 4)
    reward = torch.cat([b.columns["reward"] for b in batches]).view(6, 4).double().numpy()
    centred = reward - reward.mean(1, keepdims=True)
    if kind == "batch":
        np.testing.assert_allclose(found, centred / (reward.std(ddof=1) + 1e-4), atol=1e-6)
    else:
        assert float(found.double().mean()) == pytest.approx(0, abs=1e-6)
        assert float(found.double().std()) == pytest.approx(1, abs=1e-3)


def test_several_updates_learn_from_the_same_completions_against_their_own_probabilities():
    session, made = sessions(updates=3, temperature=1.5)
    rows = random_rows()
    first = made(batch_of(session, rows), session)
    for parameter in session.model.parameters():
        parameter.data.mul_(1.1)
    session.step = 2
    again = made(batch_of(session, rows), session)
    assert torch.equal(first.target_N, again.target_N)
    for name in ("advantage_N", "old_logp_N", "reward", "sequence_weight"):
        assert torch.equal(first.columns[name], again.columns[name]), name
    with torch.no_grad():
        logits = tiny_llama()(first.inputs["input_ids"], attention_mask=first.inputs["attention_mask"]).logits / 1.5
    wanted = logits.log_softmax(-1).view(-1, 64)[first.position_N].gather(1, first.target_N[:, None]).squeeze(1)
    torch.testing.assert_close(first.columns["old_logp_N"], wanted, atol=1e-5, rtol=1e-5)
    session.step = 3
    assert not torch.equal(made(batch_of(session, rows), session).target_N, first.target_N)


def test_a_run_killed_between_two_updates_goes_on_to_the_same_bits(tmp_path):
    def run(folder=None, stop=None, resume=False):
        session, _ = sessions(GRPO(), updates=2)

        def kill(event, record):
            if event in ("step", "tick") and record["step"] == stop:
                raise KeyboardInterrupt

        trainer = Trainer(session, random_rows(), settings(save_steps=1), folder=folder, observe=kill)
        assert trainer.total == 6
        try:
            trainer.run(resume=resume)
        except KeyboardInterrupt:
            assert stop is not None
        return weights(session.model)

    whole = run()
    run(tmp_path, stop=2)
    run(tmp_path, stop=4, resume=True)  # the checkpoint of step 3 stands between two updates
    last = run(tmp_path, resume=True)
    for name, value in whole.items():
        assert torch.equal(value, last[name]), name


def test_accumulation_changes_nothing_with_several_updates_and_a_spread_over_the_step():
    def run(accumulation):
        session, _ = sessions(GRPO(loss="dapo", beta=0.1), updates=2, advantages="batch", kl_in_reward=0.05)
        Trainer(session, random_rows(), settings(accumulation=accumulation, **SGD)).run()
        return weights(session.model)

    one, three = run(1), run(3)
    for name, value in one.items():
        torch.testing.assert_close(value, three[name], atol=2e-5, rtol=1e-3)


def test_grpo_trains_an_adapter_against_the_base_beneath_it():
    session, _ = sessions(GRPO(beta=0.5), lora=True)
    before = weights(session.model)
    records = []
    trainer = Trainer(session, random_rows(), settings(epochs=2), observe=lambda e, v: records.append((e, v)))
    trainer.run()
    steps = [v for e, v in records if e == "step"]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is where training starts
    assert steps[-1]["kl"] > 1e-6
    changed = {n for n, v in weights(session.model).items() if not torch.equal(v, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)


def test_a_model_changed_in_memory_is_its_own_reference():
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    made = Rollouts(reward=LAST, samples=4, max_new_tokens=6)
    session = make_session(model, objective=GRPO(beta=0.5), transforms=[made])
    records = []
    Trainer(session, random_rows(), settings(max_steps=1), observe=lambda e, v: records.append(v)).run()
    assert records[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_completions_that_were_cut_may_be_masked_or_punished(tmp_path):
    reward = own_reward(tmp_path, "[1.0] * len(rows)")
    session, made = sessions(truncated="mask", no_eos_penalty=2.0, reward=reward, advantages="none", max_new_tokens=4)
    rows = random_rows()
    rows.fetch(range(3))
    session.model.lm_head.weight.data[2] += 0.6 * session.model.lm_head.weight.data.std()
    batch = made(batch_of(session, rows, 8), session)
    finished = batch.columns["finished"]
    lasts = [batch.target_N[batch.sequence_N == b][-1].item() for b in range(32)]
    assert finished.tolist() == [float(t == 2) for t in lasts]
    assert torch.equal(batch.weight_N, finished[batch.sequence_N])
    penalised = (1.0 - 2.0 * (1 - finished)).view(8, 4)
    wanted = (penalised - penalised.mean(1, keepdim=True)).view(-1)
    torch.testing.assert_close(batch.columns["advantage_N"], wanted[batch.sequence_N])


def test_a_divergence_in_the_reward(tmp_path):
    reward = own_reward(tmp_path, "[0.0] * len(rows)")
    session, made = sessions(kl_in_reward=0.5, reward=reward, advantages="rloo")
    for parameter in session.model.parameters():
        parameter.data.mul_(1.3)
    batch = made(batch_of(session, random_rows()), session)
    reference = session.forward(batch, "reference", grad=False).logp_N
    gap = batch.columns["old_logp_N"] - reference
    kl = torch.zeros(12).index_add(0, batch.sequence_N, gap).view(3, 4)
    r = -0.5 * kl
    wanted = 4 / 3 * (r - r.mean(1, keepdim=True)).view(-1)[batch.sequence_N]
    torch.testing.assert_close(batch.columns["advantage_N"], wanted, atol=1e-5, rtol=1e-4)


def test_rewards_are_weighed_and_those_that_do_not_apply_left_out(tmp_path):
    first = own_reward(tmp_path, "[None if i % 4 == 1 else float(i % 4) for i in range(len(rows))]")
    session, made = sessions(reward=[first, {"regex": {"pattern": ".*"}}], reward_weights=[2.0, 0.5])
    batch = made(batch_of(session, random_rows(), 1), session)
    assert batch.columns["reward"].tolist() == [0.5, 0.5, 4.5, 6.5]
    session, made = sessions(reward=first)
    batch = made(batch_of(session, random_rows(), 1), session)
    assert np.isnan(batch.columns["reward"][1])
    kept = np.array([0.0, 2.0, 3.0])
    wanted = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-4)
    found = [float(batch.columns["advantage_N"][batch.sequence_N == b][0]) for b in range(4)]
    assert found == pytest.approx([wanted[0], 0.0, wanted[1], wanted[2]], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[1.0]", "gave 1 scores for 12 completions; it must give one for each"),
        ("[float('nan')] * len(rows)", "gave nan for a completion. Return a number, or None"),
        ("[float('inf')] * len(rows)", "gave inf for a completion"),
    ],
)
def test_a_reward_that_is_wrong_is_named(tmp_path, body, message):
    session, made = sessions(reward=own_reward(tmp_path, body))
    before = weights(session.model)
    with pytest.raises(UserError, match=message):
        made(batch_of(session, random_rows()), session)
    assert all(torch.equal(v, before[n]) for n, v in weights(session.model).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "makes groups of one"),
        ({"reward": "numerc"}, "Did you mean 'numeric'"),
        ({"reward": {"numeric": {"tolerance": 4}}}, "reward numeric: tolerance"),
        ({"reward": {"numeric": {}, "exact": {}}}, "with one name"),
        ({"reward_weights": [1.0, 2.0]}, "2 numbers for 1 rewards"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Rollouts(**{"reward": "numeric", **options})


def test_a_prompt_that_fills_the_context_is_refused():
    session, made = sessions()
    session.model.config.max_position_embeddings = 4
    with pytest.raises(UserError, match="fills the model's context"):
        made(batch_of(session, random_rows()), session)
