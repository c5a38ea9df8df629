"""Low-rank adaptation: the addition by hand, the seed, the targets, the saved adapter, the merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import FakeContext
from peft import PeftModel

from helpers import tiny_llama
from luthier.core.errors import UserError
from luthier.methods.parameters.lora import LowRankAdaptation, block_targets

IDS = torch.arange(3, 11)[None]


def adapted(options=None, *, seed=0, model=None):
    method = LowRankAdaptation(**{"rank": 4, **(options or {})})
    model = (model or tiny_llama()).requires_grad_(False)
    return method, method.apply(model, FakeContext(seed=seed)).eval()


def shake(model, scale=0.1):
    """Give the adapters values as if they had been trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize(
    "options", [{}, {"init": "gaussian"}, {"init": "orthogonal"}, {"dora": True}, {"rslora": True}]
)
def test_training_starts_at_the_base_with_the_base_untouched(options):
    base = tiny_llama().eval()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    wanted = base(input_ids=IDS).logits
    _, model = adapted(options, model=base)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-6, rtol=1e-5)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(before)
    for name, value in before.items():
        plain = [p for n, p in frozen.items() if n.replace(".base_layer", "").endswith(name)]
        assert any(torch.equal(p, value) for p in plain), name


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12.0 / 4), (True, 12.0 / np.sqrt(4))])
def test_the_addition_is_scale_times_b_times_a(rslora, scale):
    _, model = adapted({"alpha": 12.0, "rslora": rslora})
    shake(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    weight = layer.base_layer.weight.detach().double().numpy()
    a = layer.lora_A["default"].weight.detach().double().numpy()
    b = layer.lora_B["default"].weight.detach().double().numpy()
    assert a.shape == (4, 16)
    expected = x.double().numpy() @ (weight + scale * b @ a).T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_alpha_defaults_to_twice_the_rank():
    _, model = adapted({"rank": 6})
    assert model.peft_config["default"].lora_alpha == 12


def test_the_init_stream_decides_and_the_global_generator_is_left_alone():
    def first(seed):
        return next(p.detach().clone() for n, p in adapted(seed=seed)[1].named_parameters() if "lora_A" in n)

    one = first(0)
    assert torch.equal(one, first(0))
    assert not torch.equal(one, first(1))
    model = tiny_llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    adapted(model=model)
    assert torch.equal(torch.rand(3), expected)


def test_all_linear_maps_of_the_blocks_and_nothing_else():
    method, model = adapted()
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert block_targets(tiny_llama()) == linear
    opened = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(opened) == 2 * 2 * 7
    assert all("lora_" in n and ".layers." in n for n in opened)
    (group,) = method.groups(model)
    assert len(group["params"]) == len(opened)


def test_chosen_targets_are_checked():
    _, model = adapted({"target_modules": ["q_proj", "layers.1.mlp.up_proj"]})
    assert sum(p.requires_grad for p in model.parameters()) == 2 * (2 + 1)
    with pytest.raises(UserError, match=r"called 'q_prj'. Did you mean 'q_proj'.*down_proj"):
        adapted({"target_modules": ["q_prj"]})


def test_odd_rank_and_orthogonal_start_are_refused_before_anything_runs():
    with pytest.raises(UserError, match="even rank, got 3"):
        LowRankAdaptation(rank=3, init="orthogonal")


def test_a_classification_head_is_trained_and_saved():
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    config.num_labels = 3
    model = LlamaForSequenceClassification(config).requires_grad_(False)
    method = LowRankAdaptation(rank=2)
    made = method.apply(model, FakeContext(task="sequence-classification"))
    opened = [n for n, p in made.named_parameters() if p.requires_grad]
    assert any("score.modules_to_save" in n for n in opened)
    assert len(method.groups(made)[0]["params"]) == len(opened)
    assert made.peft_config["default"].task_type == "SEQ_CLS"


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}, {"init": "orthogonal"}])
def test_the_adapter_opens_in_plain_peft_and_the_merge_agrees(options, tmp_path):
    method, model = adapted(options)
    shake(model)
    wanted = model(input_ids=IDS).logits
    assert method.export(model) is model
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(opened(input_ids=IDS).logits, wanted, atol=1e-6, rtol=1e-5)
    merged = LowRankAdaptation(**{"rank": 4, **options, "merge": True}).export(model)
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-4)
    # the live model still carries its adapter
    assert isinstance(model, PeftModel)
    assert torch.equal(model(input_ids=IDS).logits, wanted)
