"""Own adapter types in peft: what the registration relies on, so that a new peft that differs is noticed here."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftConfig, PeftType

from helpers import tiny_llama
from luthier.core import registry
from luthier.models import peft_types

IDS = torch.arange(3, 11)[None]


@dataclass
class LouderConfig(PeftConfig):
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType("LOUDER")


class LouderLayer(peft_types.SiteLayer):
    adapter_layer_names = ("louder_gain",)

    def update_layer(self, adapter_name, config):
        self.louder_gain[adapter_name] = torch.nn.Parameter(torch.tensor(2.0))
        self.set_adapter(adapter_name)

    def forward(self, x):
        name = self.acting
        y = self.base_layer(x)
        return y if name is None else self.louder_gain[name] * y

    @torch.no_grad()
    def fold(self, adapter_name, sign):
        self.base_layer.weight *= self.louder_gain[adapter_name] ** sign


class LouderTuner(peft_types.Tuner):
    prefix, tuner_layer_cls = "louder_", LouderLayer


@pytest.fixture(scope="module")
def louder():
    member = peft_types.register("louder", LouderConfig, LouderTuner)
    assert peft_types.register("louder", LouderConfig, LouderTuner) is member  # again is harmless
    return member


def test_the_version_this_was_checked_with():
    found = Version(peft.__version__)
    assert Version("0.21") <= found < Version("0.22"), "run this file with the new peft, then widen this"


def test_the_member_is_like_any_other(louder):
    assert louder is PeftType.LOUDER is PeftType("LOUDER")
    assert louder in list(PeftType)
    assert isinstance(louder, enum.Enum)
    assert (louder.name, louder.value, louder == "LOUDER") == ("LOUDER", "LOUDER", True)


def test_the_whole_way_through_peft(louder, tmp_path):
    base = tiny_llama().eval()
    plain = base(input_ids=IDS).logits
    model = peft.get_peft_model(tiny_llama().eval(), LouderConfig(target_modules=["v_proj", "up_proj"])).eval()
    wanted = model(input_ids=IDS).logits
    assert (wanted - plain).abs().max() > 1e-3
    opened = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(opened) == 4
    assert all("louder_gain" in n for n in opened)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama().eval(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    again.merge_adapter()
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted)
    with again.disable_adapter():
        assert torch.equal(again(input_ids=IDS).logits, plain)  # powers of two: exact
    merged = again.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, LouderLayer) for m in merged.modules())
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted)


def test_a_merge_that_is_not_finite_is_undone(louder):
    model = peft.get_peft_model(tiny_llama(), LouderConfig(target_modules=["v_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.louder_gain["default"].data.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_the_method_behind_a_type_is_found_by_its_name():
    for slug in registry.names("parameters"):
        if hasattr(registry.get("parameters", slug).target, "adapter_type"):
            name = peft_types.type_name(slug)
            peft_types.ensure(name)
            assert name in PeftType.__members__
    peft_types.ensure("NO_SUCH_TYPE")
    assert "NO_SUCH_TYPE" not in PeftType.__members__
