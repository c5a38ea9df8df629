"""Sorted fine-tuning: the joint loss and its gradient against plain autograd in float64, exits, sampling, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.rng import stream
from luthier.engine.loop import Trainer
from luthier.engine.stack import WeightedSum
from luthier.functional.exits import Blocks, default_exits, first_blocks
from luthier.methods.objectives.sorted_ft import SortedFineTuning, distillation, exit_factors
from luthier.methods.parameters.sorted_ft import SharedHead
from luthier.methods.procedures.sorted_ft import write_exit

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}


def llama(blocks=4, seed=0, **values):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=blocks, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **values,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(session, rows=6):
    data = random_rows(rows)
    return session.task.collate(data.fetch(range(rows)), np.arange(rows))


def exit_logits(model, batch, exits):
    """Logits [N, V] at each exit by plain PyTorch: what leaves each block, the norm once, the head."""
    left = {}
    hooks = [
        block.register_forward_hook(lambda module, args, out, n=n: left.__setitem__(n, out))
        for n, block in enumerate(model.model.layers, start=1)
    ]
    model.model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    flat = {n: model.model.norm(h).flatten(0, 1)[batch.position_N] for n, h in left.items()}
    return {n: model.lm_head(flat[n]) for n in exits}


def nll(logits_NV, batch):
    return torch.nn.functional.cross_entropy(logits_NV, batch.target_N, reduction="mean")


def joint(objective, model, **context):
    """Loss over weight and gradients, as the engine forms them."""
    session = make_session(model, objective=objective)
    session.total_steps = 8
    vars(session).update(context)
    batch = batch_of(session)
    loss = session.loss(batch)
    (loss.sum / loss.weight).backward()
    return loss, {n: p.grad for n, p in model.named_parameters()}, batch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("weighting", "by_hand"),
    [
        ("mean", lambda x: (x[1] + x[3] + x[4]) / 3),
        ("sum", lambda x: x[1] + x[3] + x[4]),
        ("depth", lambda x: (x[1] / 4 + x[3] * 3 / 4 + x[4]) / 3),
        ([0.5, 0.0, 2.0], lambda x: (0.5 * x[1] + 2 * x[4]) / 3),
    ],
    ids=["mean", "sum", "depth", "list"],
)
def test_joint_loss_and_gradients_are_those_of_plain_autograd(weighting, by_hand, tied):
    model = llama(tie_word_embeddings=tied).double()
    plain = copy.deepcopy(model)
    loss, gradients, batch = joint(SortedFineTuning(exits=[1, 3, 4], exit_weights=weighting), model)
    logits = exit_logits(plain, batch, (1, 3, 4))
    wanted = by_hand({n: nll(z, batch) for n, z in logits.items()})
    wanted.backward()
    torch.testing.assert_close((loss.sum / loss.weight).detach(), wanted.detach(), atol=1e-10, rtol=0)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-10, rtol=1e-8)


def test_distillation_in_the_joint_loss_stops_at_the_whole_model():
    model = llama().double()
    plain = copy.deepcopy(model)
    objective = SortedFineTuning(exits=[2, 4], distill=0.7, distill_temperature=2.0)
    loss, gradients, batch = joint(objective, model)
    z = exit_logits(plain, batch, (2, 4))
    p = (z[4].detach() / 2).softmax(-1)
    kl = 4 * (p * (p.log() - (z[2] / 2).log_softmax(-1))).sum(-1).mean()
    wanted = (nll(z[2], batch) + 0.7 * kl + nll(z[4], batch)) / 2
    wanted.backward()
    # The head and the divergence compute in float32.
    torch.testing.assert_close((loss.sum / loss.weight).detach(), wanted.detach(), atol=1e-5, rtol=0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_distillation_value_by_hand():
    teacher, student, t = np.array([1.0, 2.0, -0.5]), np.array([0.3, 0.1, 1.2]), 1.5
    p, q = np.exp(teacher / t), np.exp(student / t)
    p, q = p / p.sum(), q / q.sum()
    found = distillation(torch.tensor(teacher)[None], torch.tensor(student)[None], t)
    assert float(found[0]) == pytest.approx(t**2 * (p * np.log(p / q)).sum(), abs=1e-6)


def test_factors_by_hand():
    assert exit_factors([2, 4, 8], 8, "mean", [2, 4, 8]) == [1 / 3] * 3
    assert exit_factors([2, 4, 8], 8, "depth", [4, 8]) == [0.25, 0.5]
    assert exit_factors([2, 4, 8], 8, "sum", [2, 8]) == [1.0, 1.0]
    assert exit_factors([2, 4, 8], 8, [3.0, 1.0, 2.0], [2, 8]) == [1.5, 1.0]


def test_default_exits_are_the_papers_for_forty_blocks():
    assert default_exits(40) == (12, 16, 20, 24, 28, 32, 36, 40)
    assert default_exits(8) == (2, 3, 4, 5, 6, 7, 8)
    assert default_exits(1) == (1,)


def test_the_whole_model_alone_is_plain_fine_tuning():
    runs = {}
    for name, objective in (("sft", None), ("sorted", SortedFineTuning(exits=[2]))):
        session = make_session(tiny_llama(), objective=objective)
        Trainer(session, random_rows(), settings(**SGD)).run()
        runs[name] = weights(session.model)
    for name, value in runs["sft"].items():
        torch.testing.assert_close(runs["sorted"][name], value, atol=1e-7, rtol=0)


def test_exits_of_a_step():
    def chosen(step, total=8, exits=(2, 4, 6, 8), **options):
        context = SimpleNamespace(
            step=step,
            total_steps=total,
            rng=lambda name, *keys: stream(0, name, *keys),
        )
        return SortedFineTuning(exits=list(exits), **options).chosen(exits, context)

    assert chosen(3) == [2, 4, 6, 8]
    assert [chosen(s, sampling="progressive")[0] for s in range(8)] == [8, 8, 6, 6, 4, 4, 2, 2]
    drawn = [tuple(chosen(s, sampling="one")) for s in range(300)]
    assert set(drawn) == {(2, 8), (4, 8), (6, 8)}
    assert all(70 < drawn.count(pair) < 130 for pair in set(drawn))
    assert chosen(5, sampling="one") == chosen(5, sampling="one")
    assert {len(chosen(s, sampling=2, keep_full=False)) for s in range(20)} == {2}
    assert {chosen(s, sampling=2)[-1] for s in range(20)} == {8}


@pytest.mark.parametrize(
    "options", [{"sampling": "one"}, {"sampling": "progressive"}, {"sampling": 2, "keep_full": False}], ids=str
)
def test_sampled_exits_do_not_depend_on_accumulation(options):
    found = []
    for accumulation in (1, 4):
        session = make_session(llama(), objective=SortedFineTuning(exits=[1, 2, 4], **options))
        Trainer(session, random_rows(), settings(accumulation=accumulation, **SGD)).run()
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-5, rtol=1e-3)


def test_inner_objective_at_every_exit():
    model = llama().double()
    plain = copy.deepcopy(model)
    objective = SortedFineTuning(exits=[2, 4], inner={"beyond-log-likelihood": {"objective": "general-2"}})
    loss, gradients, batch = joint(objective, model)
    z = exit_logits(plain, batch, (2, 4))
    p = {n: v.softmax(-1).gather(1, batch.target_N[:, None]) for n, v in z.items()}
    wanted = sum(((1 - v**2) / 2).mean() for v in p.values()) / 2
    wanted.backward()
    torch.testing.assert_close((loss.sum / loss.weight).detach(), wanted.detach(), atol=1e-10, rtol=0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-10, rtol=1e-8)
    assert float(loss.metrics["exit_2/loss"][0] / loss.metrics["exit_2/loss"][1]) == pytest.approx(
        float(((1 - p[2].detach() ** 2) / 2).mean()), abs=1e-10
    )


def test_an_inner_that_joins_positions_takes_the_plain_graph():
    class PerSequence:
        needs = registry.get("objective", "sft").target.needs.__class__(statistics=("logp",))

        def loss(self, out, batch, ctx):
            from luthier.core.protocols import Loss

            mean_B = torch.zeros(batch.examples, dtype=out.logp_N.dtype).index_add(0, batch.sequence_N, out.logp_N)
            return Loss(sum=mean_B.exp().sum(), weight=float(batch.examples), unit="sequence")

    model = llama().double()
    plain = copy.deepcopy(model)
    objective = SortedFineTuning(exits=[2, 4])
    objective.inner = PerSequence()
    _, gradients, batch = joint(objective, model)
    wanted = 0.0
    for z in exit_logits(plain, batch, (2, 4)).values():
        logp = z.log_softmax(-1).gather(1, batch.target_N[:, None]).squeeze(1)
        wanted = wanted + torch.zeros(6, dtype=torch.float64).index_add(0, batch.sequence_N, logp).exp().sum() / 6 / 2
    wanted.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-10, rtol=1e-8)


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = llama()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(joint(SortedFineTuning(exits=[1, 2, 4]), model)[1])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-7, rtol=1e-6)


def test_as_a_term_of_a_weighted_sum():
    model = llama().double()
    plain = copy.deepcopy(model)
    sft = registry.get("objective", "sft").build()
    both = WeightedSum([("sft", sft, 0.25), ("sorted-ft", SortedFineTuning(exits=[2, 4]), 2.0)])
    batch = batch_of(make_session(llama(), objective=None))
    totals = {"token": float(batch.weight_N.sum()), "sequence": 6.0}
    loss, gradients, batch = joint(both, model, totals=totals)
    z = exit_logits(plain, batch, (2, 4))
    wanted = 0.25 * nll(z[4], batch) + (nll(z[2], batch) + nll(z[4], batch))
    wanted.backward()
    torch.testing.assert_close((loss.sum / loss.weight).detach(), wanted.detach(), atol=1e-10, rtol=0)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-10, rtol=1e-8)


# -- the shared head beside an adapter


def test_lora_trains_through_every_exit_and_the_shared_head_is_saved_merged(tmp_path):
    from luthier.models.save import save

    lora = registry.get("parameters", "lora").build({"rank": 2})
    session = make_session(llama(), objective=SortedFineTuning(exits=[2, 4]), parameters=[lora, SharedHead()])
    before = weights(session.model)
    Trainer(session, random_rows(), settings(**SGD)).run()
    changed = {n for n, v in weights(session.model).items() if not torch.equal(v, before[n])}
    assert any("layers.1" in n and "lora_" in n for n in changed)
    assert {n.split(".", 2)[2] for n in changed if "lora_" not in n} == {"model.norm.weight", "lm_head.weight"}
    model = session.model
    for part in session.stack.parameters:
        model = part.export(model)
    ids = torch.arange(3, 11)[None]
    save(model, None, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(opened(ids).logits, session.model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_shared_head_alone_and_untied():
    model = llama(tie_word_embeddings=True)
    session = make_session(model, parameters=[SharedHead(untie=True)])
    opened = {n for n, p in session.model.named_parameters() if p.requires_grad}
    assert opened == {"model.norm.weight", "lm_head.weight"}
    before = model.get_input_embeddings().weight.detach().clone()
    Trainer(session, random_rows(), settings()).run()
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("head_first", [True, False])
def test_the_shared_head_and_the_adapter_go_in_any_order(head_first):
    lora = registry.get("parameters", "lora").build({"rank": 2})
    both = [SharedHead(), lora]
    session = make_session(llama(), parameters=both if head_first else both[::-1])
    Trainer(session, random_rows(), settings()).run()
    base = llama().state_dict()
    model = session.model.get_base_model()
    assert not torch.equal(model.lm_head.weight.detach(), base["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight.detach(), base["model.embed_tokens.weight"])


# -- what a run leaves


def test_exits_are_noted_and_a_cut_checkpoint_is_the_exit(tmp_path):
    objective = SortedFineTuning(exits=[1, 3, 4])
    session = make_session(llama(), objective=objective)
    Trainer(session, random_rows(), settings(max_steps=2)).run()
    model = session.model.eval()
    objective.finish_model(model, None)
    assert model.config.sorted_exits == [1, 3, 4]
    write_exit(model, None, 3, tmp_path / "three")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "three").eval()
    assert (opened.config.num_hidden_layers, opened.config.sorted_exits) == (3, [1, 3])
    assert len(opened.model.layers) == 3
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    ids = torch.arange(3, 11)[None]
    with torch.no_grad(), Blocks(model) as blocks:
        found = {n: blocks.run(0, n, ids, logits=8)[0] for n in (3, 4)}
    torch.testing.assert_close(found[3], opened(ids).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[4], model(ids).logits, atol=1e-6, rtol=0)


def test_a_cut_model_shares_its_tensors():
    model = llama()
    part = first_blocks(model, 2)
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in part.parameters())
    assert len(model.model.layers) == 4


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": []}, "increase strictly"),
        ({"exits": [0, 4]}, "increase strictly"),
        ({"exits": [2, 2, 4]}, "increase strictly"),
        ({"exits": [4, 2]}, "increase strictly"),
        ({"sampling": 0}, "at least 1"),
        ({"exit_weights": [1.0, 2.0]}, "needs exits as a list of the same length"),
        ({"exits": [2, 4], "exit_weights": [1.0]}, "needs exits as a list of the same length"),
        ({"exits": [2, 4], "exit_weights": [-1.0, 1.0]}, "0 or more"),
        ({"inner": {"sft": {}, "focal": {}}}, "one objective"),
        ({"inner": "no-such"}, "unknown objective 'no-such'"),
        ({"inner": {"beyond-log-likelihood": {"objective": "top_p-0.5"}}}, "divides by a count that depends on"),
        ({"inner": {"sft": {"alpha": 1}}}, "inner: sft: .*alpha"),
        ({"inner": {"sorted-ft": {"exits": [2, 4]}}}, "reads hidden layers"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        registry.get("objective", "sorted-ft").build(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": [2, 9]}, r"the last exit, 9, lies beyond the last block: the model has 4 blocks. Write \[2, 4\]"),
        ({"exits": [1, 3]}, r"the last exit, 3, is not the whole model: the model has 4 blocks. Write \[1, 3, 4\]"),
        ({"exits": [2, 4], "sampling": 2}, r"2 exits of a step beside the whole model, but exits are \[2, 4\]"),
    ],
    ids=str,
)
def test_exits_must_fit_the_model_before_the_first_step(options, message):
    with pytest.raises(UserError, match=message):
        Trainer(make_session(llama(), objective=SortedFineTuning(**options)), random_rows(), settings())


def test_a_model_that_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match="no exit after block 5: the model has 4 blocks"):
        first_blocks(llama(), 5)
    lora = registry.get("parameters", "lora").build({"rank": 2})
    with pytest.raises(UserError, match="merge it first"):
        first_blocks(make_session(llama(), parameters=[lora]).model, 2)
    model = llama()
    model.config.hidden_size_per_layer_input = 8
    with pytest.raises(UserError, match="its blocks read inputs of their own"):
        first_blocks(model, 2)
