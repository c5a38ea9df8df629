"""The baselines through peft: dora, ia3, prompt and prefix tuning, the linear probe; by hand, saved, opened, merged."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from fakes import FakeContext
from peft import PeftModel
from safetensors.torch import load_file

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.functional.writing import completions
from luthier.methods.parameters._adapters import ADAPTERS
from luthier.methods.parameters.dora import WeightDecomposed
from luthier.methods.parameters.ia3 import ChannelFactors, default_targets
from luthier.methods.parameters.linear_probe import LinearProbe
from luthier.methods.parameters.lora import LowRankAdaptation
from luthier.methods.parameters.prefix_tuning import PrefixTuning
from luthier.methods.parameters.prompt_tuning import PromptTuning, starting_prompt
from luthier.models.load import load
from luthier.models.merge import merge
from luthier.models.save import save
from luthier.runs.verify import verify_head

IDS = {"input_ids": torch.arange(3, 11)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
MADE = {
    "dora": lambda: WeightDecomposed(rank=4),
    "ia3": ChannelFactors,
    "prompt-tuning": lambda: PromptTuning(tokens=3),
    "prefix-tuning": lambda: PrefixTuning(tokens=3),
}


def adapted(method, model=None, *, task="causal-lm", seed=0):
    return method.apply((model or tiny_llama()).requires_grad_(False), FakeContext(seed=seed, task=task)).eval()


def shake(model):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def classifier():
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels = 3
    return transformers.LlamaForSequenceClassification(config)


def test_the_list_of_adapters_is_complete():
    found = []
    for slug in registry.names("parameters"):
        target = registry.get("parameters", slug).target
        if getattr(target, "marks", ()):
            found.append(slug)
    assert sorted(found) == sorted(ADAPTERS)


def test_dora_is_lora_with_row_norms():
    one, other = adapted(WeightDecomposed(rank=4)), adapted(LowRankAdaptation(rank=4, dora=True))
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())
    layer = one.base_model.model.model.layers[0].mlp.up_proj
    norms = layer.base_layer.weight.norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, norms)


def test_ia3_by_hand():
    base = tiny_llama().eval()
    wanted = base(**IDS).logits
    model = adapted(ChannelFactors())
    assert torch.equal(model(**IDS).logits, wanted)
    opened = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted({n.split(".")[-3] for n in opened}) == ["down_proj", "k_proj", "v_proj"]
    shake(model)
    block = model.base_model.model.model.layers[0]
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    wide = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    factor = block.self_attn.k_proj.ia3_l["default"].detach().numpy().reshape(-1)
    plain = x.numpy() @ block.self_attn.k_proj.base_layer.weight.detach().numpy().T
    np.testing.assert_allclose(block.self_attn.k_proj(x).detach().numpy(), plain * factor, atol=1e-6)
    factor = block.mlp.down_proj.ia3_l["default"].detach().numpy().reshape(-1)
    plain = (wide.numpy() * factor) @ block.mlp.down_proj.base_layer.weight.detach().numpy().T
    np.testing.assert_allclose(block.mlp.down_proj(wide).detach().numpy(), plain, atol=1e-6)


def test_ia3_factors_are_not_decayed():
    method = ChannelFactors()
    groups = method.groups(adapted(method))
    assert groups[0]["weight_decay"] == 0.0
    assert len(groups[0]["params"]) == 2 * 3


def test_ia3_finds_fused_and_other_names():
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    attention, feed_forward = default_targets(transformers.GPT2LMHeadModel(config))
    assert {p.rpartition(".")[2] for p in attention} == {"c_attn"}
    assert {p.rpartition("h.")[2] for p in feed_forward} == {"0.mlp.c_proj", "1.mlp.c_proj"}
    adapted(ChannelFactors(), transformers.GPT2LMHeadModel(config))
    with pytest.raises(UserError, match="both target_modules and feed_forward_modules"):
        ChannelFactors(target_modules=["k_proj"])
    with pytest.raises(UserError, match=r"ia3: target_modules.*'k_prj'. Did you mean 'k_proj'"):
        adapted(ChannelFactors(target_modules=["k_prj"], feed_forward_modules=["down_proj"]))


def test_where_a_prompt_starts():
    table_VH = torch.arange(12.0).view(6, 2)
    generator = torch.Generator().manual_seed(0)
    assert starting_prompt(table_VH, 5, generator, [1, 4], noise=False).tolist() == [
        [2.0, 3.0],
        [8.0, 9.0],
        [2.0, 3.0],
        [8.0, 9.0],
        [2.0, 3.0],
    ]
    drawn = starting_prompt(table_VH, 40, generator, noise=False)
    assert all(row in table_VH.tolist() for row in drawn.tolist())
    noise = starting_prompt(table_VH, 4000, generator, noise=True)
    assert float(noise.std()) == pytest.approx(float(table_VH.std()), rel=0.05)
    with pytest.raises(UserError, match="has no token"):
        adapted(PromptTuning(tokens=2, init="!!!"))


@pytest.mark.parametrize("slug", ["prompt-tuning", "prefix-tuning"])
def test_the_run_sees_the_virtual_tokens_that_peft_puts_there(slug):
    method = MADE[slug]()
    session = make_session(parameters=[method])
    shake(session.model)
    assert verify_head(session) < 1e-4  # the task's own pass against peft's
    rows = random_rows(4)
    batch = session.task.collate(rows.fetch(range(4)), range(4))
    session.model.eval()
    logits_BTV = session.model(**batch.inputs).logits
    logits_BTV = logits_BTV[:, logits_BTV.shape[1] - batch.inputs["input_ids"].shape[1] :]
    wanted = logits_BTV.flatten(0, 1)[batch.position_N].log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]
    torch.testing.assert_close(session.forward(batch, grad=False).logp_N, wanted, atol=1e-5, rtol=1e-5)
    plain = tiny_llama().eval()(**batch.inputs).logits.flatten(0, 1)[batch.position_N]
    assert (plain.log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0] - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("slug", ["ia3", "prompt-tuning", "prefix-tuning"])
def test_a_classification_head_is_trained_too(slug):
    method = MADE[slug]()
    model = adapted(method, classifier(), task="sequence-classification")
    opened = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("score.modules_to_save" in n for n in opened)
    assert len(opened) == sum(len(g["params"]) for g in method.groups(model))


def test_a_prefix_made_by_a_network_is_saved_as_what_it_makes(tmp_path):
    model = adapted(PrefixTuning(tokens=3, projection=True, projection_width=5))
    assert any("transform" in n for n, p in model.named_parameters() if p.requires_grad)
    shake(model)
    wanted = model(**IDS).logits
    model.save_pretrained(tmp_path)
    (stored,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert stored.shape == (3, 2 * 2 * 16)  # tokens; layers, keys and values, width
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(opened(**IDS).logits, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_probe_of_a_language_model_leaves_its_features_alone(tied):
    model = tiny_llama(tied=tied)
    features = model.model(**IDS).last_hidden_state
    session = make_session(model, parameters=[LinearProbe()])
    opened = [n for n, p in session.model.named_parameters() if p.requires_grad]
    assert opened == ["lm_head.weight"]
    assert not session.model.config.tie_word_embeddings
    before = session.model.lm_head.weight.detach().clone()
    Trainer(session, random_rows(), settings(max_steps=2)).run()
    assert not torch.equal(session.model.lm_head.weight, before)
    assert torch.equal(session.model.model(**IDS).last_hidden_state, features)


def test_the_probe_of_a_classifier_and_two_claims_on_one_head():
    model = LinearProbe().apply(classifier().requires_grad_(False), FakeContext(task="sequence-classification"))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["score.weight"]
    with pytest.raises(UserError, match=r"both claim the tensor 'lm_head\.weight'"):
        make_session(parameters=[LinearProbe(), LinearProbe()])


def test_a_merge_into_a_quantised_base_is_refused_before_training():
    for method in (ChannelFactors(merge=True), LowRankAdaptation(rank=2, merge=True), WeightDecomposed(merge=True)):
        model = tiny_llama()
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
        with pytest.raises(UserError, match="merging into quantised weights changes them"):
            adapted(method, model)


READER = """
import sys, torch
from luthier.models.load import load
from safetensors.torch import save_file
loaded = load(sys.argv[1])
ids = torch.arange(3, 11)[None]
with torch.no_grad():
    save_file({"x": loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}, sys.argv[2])
"""


@pytest.mark.parametrize("slug", MADE)
def test_saved_opened_in_a_new_process_and_merged_where_it_can_be(slug, tmp_path):
    made = load("lab:nano")
    save(made.model, made.processor, tmp_path / "base")
    base = load(tmp_path / "base")
    method = MADE[slug]()
    model = adapted(method, base.model)
    shake(model)
    wanted = model(**IDS).logits.detach()
    save(method.export(model), base.processor, tmp_path / "adapter", task="causal-lm")
    subprocess.run([sys.executable, "-c", READER, str(tmp_path / "adapter"), str(tmp_path / "x")], check=True)
    torch.testing.assert_close(load_file(tmp_path / "x")["x"], wanted, atol=1e-5, rtol=1e-5)
    if hasattr(type(method), "unmergeable"):
        with pytest.raises(UserError, match="cannot be merged into weights"):
            merge(tmp_path / "adapter", tmp_path / "merged")
        return
    merge(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged").model(**IDS).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slug", ["prompt-tuning", "prefix-tuning"])
def test_what_is_written_is_what_the_trained_model_would_choose(slug):
    """Prompts of different lengths together, against one token at a time by peft's own forward pass, unpadded."""
    method = MADE[slug]()
    session = make_session(parameters=[method])
    shake(session.model)
    session.model.generation_config.eos_token_id = None
    session.processor = SimpleNamespace(eos_token_id=None, pad_token_id=0, decode=lambda ids, **_: "")
    prompts = [[5, 9, 33], [7, 8, 9, 10, 11, 12], [40, 41, 42]]
    written = completions(session.model, prompts, session, batch_rows=8, max_new_tokens=5)
    for prompt, found in zip(prompts, written, strict=True):
        ids = list(prompt)
        for _ in range(5):
            given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            ids.append(int(session.model.eval()(**given, use_cache=False).logits[0, -1].argmax()))
        assert list(found.token_ids) == ids[len(prompt) :]


def test_their_recipes_are_checked_without_torch():
    """Of all recipes the plan needs no torch: their files say what they need when they are asked for it."""
    code = (
        "import sys\nfrom luthier.core import registry\n"
        "for slug in ('dora', 'ia3', 'linear-probe', 'loramoe', 'prefix-tuning', 'prompt-tuning', 'qlora', "
        "'scale-shift-features'):\n    registry.get('parameters', slug).build({})\n"
        "registry.get('analysis', 'loramoe').build({})\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
