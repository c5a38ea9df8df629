"""LoRAMoE: layer and balancing loss by hand, the optimum a lone router finds, padding, checkpointing, refusals."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes import FakeContext
from peft import PeftModel

from helpers import OpenAll, make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional.expert_routing import balance, dispersion, importance, mass, soft_routing
from luthier.methods.parameters.loramoe import LoRAMoE, expert_layers
from luthier.models.load import load
from luthier.models.merge import merge
from luthier.models.save import save
from luthier.models.tuners.loramoe import LoRAMoEConfig, LoRAMoELayer

IDS = {"input_ids": torch.arange(3, 11)[None]}
SMALL = {"experts": 4, "rank": 2, "dropout": 0.0}


def adapted(model=None, **options):
    method = LoRAMoE(**{**SMALL, **options})
    model = (model or tiny_llama()).requires_grad_(False)
    return method, method.apply(model, FakeContext())


def shake(method, model):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in method.opened(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def typed(count=16, *, seed=0, value=lambda i: i % 2):
    rows = random_rows(count, seed=seed)
    rows.columns["task_type"] = [value(i) for i in range(count)]
    return rows


@pytest.mark.parametrize("top_k", [None, 1])
def test_the_layer_by_hand(top_k):
    rng = np.random.default_rng(0)
    x, w0 = rng.normal(size=(2, 3, 4)), rng.normal(size=(3, 4))
    a, b, g = rng.normal(size=(2, 1, 4)), rng.normal(size=(2, 3, 1)), rng.normal(size=(2, 4))
    scores = x @ g.T
    if top_k == 1:
        scores = np.where(scores == scores.max(-1, keepdims=True), scores, -np.inf)
    weight = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = x @ w0.T
    for n in range(2):
        wanted = wanted + weight[..., n, None] * (8.0 / 1) * (x @ a[n].T) @ b[n].T
    base = torch.nn.Linear(4, 3, bias=False).double()
    base.weight.data = torch.tensor(w0)
    layer = LoRAMoELayer(base, "default", LoRAMoEConfig(experts=2, rank=1, alpha=8.0, top_k=top_k), "x")
    layer.loramoe_A["default"].data = torch.tensor(a.reshape(2, 4))
    layer.loramoe_B["default"].data = torch.tensor(np.concatenate(list(b), axis=1))
    layer.loramoe_router["default"].data = torch.tensor(g)
    # the routing is float32 by design
    np.testing.assert_allclose(layer(torch.tensor(x)).detach().numpy(), wanted, atol=1e-5)


def test_training_starts_at_the_base_and_only_experts_and_routers_are_open():
    wanted = tiny_llama().eval()(**IDS).logits
    method, model = adapted()
    assert torch.equal(model.eval()(**IDS).logits, wanted)
    opened = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(opened) == 3 * 3 * 2
    assert len(expert_layers(model)) == 6
    assert all("loramoe_" in n and ".mlp." in n for n in opened)
    assert len(method.groups(model)[0]["params"]) == len(opened)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    bound = 1 / np.sqrt(16)  # Kaiming uniform with a = sqrt(5) over 16 inputs
    for tensor in (layer.loramoe_A["default"], layer.loramoe_router["default"]):
        assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound


def test_each_expert_has_its_own_dropout():
    base = torch.nn.Linear(64, 1, bias=False)
    torch.nn.init.zeros_(base.weight)
    layer = LoRAMoELayer(base, "default", LoRAMoEConfig(experts=2, rank=1, alpha=1.0, dropout=0.5), "x").train()
    layer.loramoe_A["default"].data = torch.ones(2, 64)
    layer.loramoe_router["default"].data = torch.zeros(2, 64)  # both weigh a half
    torch.manual_seed(0)
    layer.loramoe_B["default"].data = torch.tensor([[1.0, -1.0]])
    assert float(layer(torch.ones(1, 1, 64)).abs().detach()) > 0  # one common draw would cancel


@pytest.mark.parametrize(
    ("mass_BN", "contrast", "types", "wanted"),
    [
        ([[5.0, 5.0], [5.0, 5.0]], 0.0, [1, 0], 0.0),
        ([[1.0, 3.0], [3.0, 1.0]], 0.5, [1, 0], 0.0),
        ([[2.0, 2.0], [2.0, 2.0]], 0.5, [1, 0], 1 / 3),
    ],
)
def test_the_loss_by_hand(mass_BN, contrast, types, wanted):
    # experts 0 .. N/2 - 1 belong to type 1, the rest to type 0
    weight_BN = importance(torch.tensor(types), torch.tensor([1, 0]), contrast)
    found = balance(torch.tensor([mass_BN]), weight_BN)
    assert float(found) == pytest.approx(wanted, abs=1e-6)


def test_dispersions_by_hand():
    value = torch.tensor([3.0, 1.0, 1.0, 3.0])  # unbiased variance 4/3, mean 2
    assert float(dispersion(value, "cv2")) == pytest.approx(1 / 3)
    assert float(dispersion(value, "index")) == pytest.approx(2 / 3)
    assert float(dispersion(torch.tensor([7.0]))) == 0.0
    per_example = balance(torch.tensor([[[3.0, 1.0], [2.0, 2.0]]]), torch.ones(2, 2), over="example")
    assert float(per_example) == pytest.approx(2 / 4)  # variance 2 over 2 squared, and nothing


@pytest.mark.parametrize(("contrast", "over"), [(0.3, "batch"), (0.3, "example"), (0.0, "batch")])
def test_a_lone_router_finds_the_optimum(contrast, over):
    """Two separable types: the first half's share goes to (1 - contrast) / 2 for type 1, and mirrored for type 0."""
    torch.manual_seed(0)
    router = torch.nn.Linear(2, 4, bias=False)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    example_B = torch.tensor([1, 0] * 8)
    x_BTH = torch.nn.functional.one_hot(example_B, 2)[:, None].expand(-1, 5, -1).float()
    weight_BN = importance(example_B, torch.tensor([1, 1, 0, 0]), contrast)
    for _ in range(400):
        mass_MBN = mass(soft_routing(router(x_BTH))[None], None)
        optimizer.zero_grad()
        balance(mass_MBN, weight_BN, over=over).sum().backward()
        optimizer.step()
    mass_MBN = mass_MBN.detach()
    share_B = mass_MBN[0, :, :2].sum(1) / mass_MBN[0].sum(1)
    assert float(share_B[example_B == 1].mean()) == pytest.approx((1 - contrast) / 2, abs=0.02)
    assert float(share_B[example_B == 0].mean()) == pytest.approx((1 + contrast) / 2, abs=0.02)


def auxiliary(rows, index, *, width=0, **options):
    """The balancing loss of some rows as one micro-batch, padded to a width."""
    method = LoRAMoE(**{**SMALL, **options})
    session = make_session(parameters=[method])
    batch = session.task.collate(rows.fetch(index), index, ("task_type",))
    if width:
        extra = width - batch.inputs["input_ids"].shape[1]
        batch.inputs = {k: torch.nn.functional.pad(v, (0, extra)) for k, v in batch.inputs.items()}
        batch.position_N = batch.position_N + batch.sequence_N * extra
    session.totals = session.stack.counts([batch], session)
    session.model.train()
    session.forward(batch)
    return method.auxiliary(session.model, batch, session)


def test_padding_does_not_count_unless_told_so():
    rows = typed(6)
    plain, padded = auxiliary(rows, range(6)), auxiliary(rows, range(6), width=40)
    torch.testing.assert_close(padded.sum, plain.sum, atol=1e-7, rtol=1e-5)
    counted = [auxiliary(rows, range(6), count_padding=True, width=w).sum for w in (0, 40)]
    assert abs(float(counted[0] - counted[1])) > 1e-3


def test_sum_and_mean_over_the_maps():
    total, mean = (auxiliary(typed(4), range(4), reduce=kind) for kind in ("sum", "mean"))
    torch.testing.assert_close(total.sum, mean.sum * 6)  # three maps in two blocks
    assert (total.unit, float(total.weight)) == ("batch", 1.0)
    assert 0 < float(np.divide(*map(float, total.metrics["first_group_share/1"]))) < 1


def trained(*, checkpointing=False, objective=None, **options):
    session = make_session(parameters=[LoRAMoE(**{**SMALL, **options})], objective=objective)
    if checkpointing:
        session.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    records = []
    Trainer(
        session,
        typed(16),
        settings(max_steps=3),
        observe=lambda event, values: records.append(values) if event == "step" else None,
    ).run()
    return weights(session.model), records


def test_the_loss_is_added_and_logged_and_survives_checkpointing():
    plain, records = trained(contrast=0.3)
    first = records[0]
    assert first["loss"] == pytest.approx(first["nll"] + first["parameters#0/loss"], rel=1e-5)
    assert {"parameters#0/first_group_share/1", "parameters#0/first_group_share/0"} <= set(first)
    again, _ = trained(contrast=0.3, checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-4)


class ExpertsAlone(OpenAll):
    """The same experts, opened by a method that knows no balancing loss."""

    def apply(self, model, ctx):
        return LoRAMoE(**SMALL, balance_weight=0.0).apply(model, ctx)


def test_without_weight_it_is_plain_training_bit_for_bit():
    zero, records = trained(balance_weight=0.0)
    assert records[0]["loss"] == records[0]["nll"]
    session = make_session(parameters=[ExpertsAlone()])
    Trainer(session, typed(16), settings(max_steps=3)).run()
    plain = weights(session.model)
    assert zero.keys() == plain.keys()
    assert all(torch.equal(zero[name], plain[name]) for name in zero)


def test_rows_without_a_known_type_are_refused_before_the_first_step():
    def start(rows, **options):
        Trainer(make_session(parameters=[LoRAMoE(**SMALL, **options)]), rows, settings(max_steps=1))

    with pytest.raises(UserError, match="row 0 of the prepared data has no 'task_type'"):
        start(random_rows())
    with pytest.raises(UserError, match=r"row 3 .* task_type = 'facs'.*Did you mean 'facts'"):
        start(typed(value=lambda i: "facs" if i == 3 else "facts"), types=["facts", "other"])
    start(typed(value=lambda i: f"t{i}"), types=["t0", "*"])
    start(random_rows(), balance_weight=0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": 3}, "3 experts cannot be divided among 2 types"),
        ({"experts": 1}, "one expert cannot be balanced"),
        ({"types": [1, 1]}, "one is there twice"),
        ({"experts": 2, "top_k": 3}, "only 2 experts, not 3"),
        ({"experts": 2, "expert_types": [1, 2]}, "one of 1, 0 for each of 2 experts"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(UserError, match=said):
        LoRAMoE(**options)
    LoRAMoE(experts=1, balance_weight=0.0)
    LoRAMoE(experts=3, expert_types=[1, 0, 0])


def test_modules_that_are_not_there():
    with pytest.raises(UserError, match=r"loramoe: target_modules.*'up_prj'. Did you mean 'up_proj'"):
        adapted(target_modules=["up_prj"])


READER = """
import sys, torch
from luthier.models.load import load
from safetensors.torch import save_file
loaded = load(sys.argv[1])
with torch.no_grad():
    save_file({"logits": loaded.model(input_ids=torch.arange(3, 11)[None]).logits}, sys.argv[2])
"""


def test_the_adapter_opens_in_a_new_process_and_is_not_merged(tmp_path):
    from safetensors.torch import load_file

    made = load("lab:nano")
    save(made.model, made.processor, tmp_path / "base")
    base = load(tmp_path / "base")
    method, model = adapted(base.model)
    shake(method, model)
    wanted = model.eval()(**IDS).logits.detach()
    assert isinstance(method.export(model), PeftModel)
    save(model, base.processor, tmp_path / "adapter", task="causal-lm")
    subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "adapter"), str(tmp_path / "out.safetensors")], check=True
    )
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="anew for every token"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(ValueError, match="anew for every token"):
        model.merge_and_unload()
