"""Saved and merged models open in plain transformers and peft, tied as they are, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from luthier.core.errors import LuthierError, UserError
from luthier.models import merge as merging
from luthier.models.load import load
from luthier.models.save import save
from luthier.models.shards import Shards

IDS = torch.tensor([[2, 7, 4, 9]])


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(46))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def llama(*, tied: bool = True) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=48,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=3,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def settings(folder: Path, file: str = "config.json") -> dict:
    return json.loads((folder / file).read_text())


@pytest.mark.parametrize("tied", [True, False])
def test_opens_in_plain_transformers(tmp_path: Path, tied: bool) -> None:
    model = llama(tied=tied)
    model.config.use_cache = False
    folder = save(model, tokenizer(), tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert settings(folder)["tie_word_embeddings"] is tied
    assert settings(folder)["use_cache"] is True
    assert ("lm_head.weight" in Shards(folder).names()) is not tied
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert transformers.AutoTokenizer.from_pretrained(folder)("w0 w5").input_ids == [2, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_embeddings_untied_in_memory_are_untied_on_disk(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    again = transformers.AutoModelForCausalLM.from_pretrained(save(model, tokenizer(), tmp_path / "m"))
    assert again.config.tie_word_embeddings is False
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert torch.equal(again.lm_head.weight, 2 * again.model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_reduced_precision_on_disk(tmp_path: Path, tied: bool) -> None:
    model = llama(tied=tied)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folder = save(model, tokenizer(), tmp_path / "m", dtype="bfloat16")
    shards = Shards(folder)
    assert {info.dtype for info in shards.header.values()} == {"BF16"}
    assert ("lm_head.weight" in shards.names()) is not tied
    assert settings(folder)["dtype"] == "bfloat16"
    assert all(torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in model.state_dict().items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(shards.tensor(name), before[name].bfloat16())
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_generation_settings_are_valid_and_stop(tmp_path: Path) -> None:
    model = llama()
    model.generation_config.temperature = 0.6  # beside do_sample: false, which transformers refuses to save
    model.generation_config.top_p = 0.9
    saved = settings(save(model, tokenizer(), tmp_path / "m"), "generation_config.json")
    assert "temperature" not in saved
    assert "top_p" not in saved
    # The model's own stop token 3 is kept and the tokenizer's 1 is added.
    assert saved["eos_token_id"] == [3, 1]
    assert saved["pad_token_id"] == 0
    sampling = llama()
    sampling.generation_config.do_sample = True
    sampling.generation_config.temperature = 0.6
    assert settings(save(sampling, tokenizer(), tmp_path / "s"), "generation_config.json")["temperature"] == 0.6


def test_padding_of_the_last_call_is_not_saved(tmp_path: Path) -> None:
    used = tokenizer()
    used(["w0", "w1 w2 w3"], padding=True, truncation=True, max_length=2)
    save(llama(), used, tmp_path / "used")
    save(llama(), tokenizer(), tmp_path / "fresh")
    assert (tmp_path / "used/tokenizer.json").read_text() == (tmp_path / "fresh/tokenizer.json").read_text()


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = save(llama(), tokenizer(), tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Breaks:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(LuthierError, match="No space left"):
        save(llama(tied=False), Breaks(), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def adapted(tmp_path: Path, targets: list[str], *, tied: bool = True) -> Path:
    base = save(llama(tied=tied), tokenizer(), tmp_path / "base")
    opened = load(base)
    model = peft.get_peft_model(opened.model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    return save(model, opened.processor, tmp_path / "adapter", task="causal-lm", base_fingerprint=opened.fingerprint)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("targets", "tied", "untied"),
    [(["q_proj", "up_proj"], True, False), (["lm_head"], True, True), (["embed_tokens", "v_proj"], True, True),
     (["lm_head"], False, False)],
)  # fmt: skip
def test_merging_changes_nothing(tmp_path: Path, targets: list[str], tied: bool, untied: bool) -> None:
    adapter = adapted(tmp_path, targets, tied=tied)
    # In plain peft, without Luthier.
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = peft.PeftModel.from_pretrained(base, adapter)(IDS).logits
    report = merging.merge(adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
    assert report.untied is untied
    assert report.max_difference < 1e-4 < report.adapter_effect
    assert report.same_top1 == 1.0
    assert merged.config.tie_word_embeddings is (tied and not untied)
    json.dumps(report.to_dict())


def test_a_merge_that_differs_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapted(tmp_path, ["q_proj"])
    with pytest.raises(LuthierError, match=r"largest logit difference .* Nothing was written"):
        merging.merge(adapter, tmp_path / "merged", dtype="bfloat16", tolerance=1e-6)
    assert not (tmp_path / "merged").exists()
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(LuthierError, match="differs from the adapter"):
        merging.merge(adapter, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    base = save(llama(), tokenizer(), tmp_path / "base")
    with pytest.raises(UserError, match="not an adapter"):
        merging.merge(base, tmp_path / "merged")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        merging.merge(base, tmp_path / "merged", dtype="int8")
    opened = load(base)
    prompts = peft.get_peft_model(opened.model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    save(prompts, opened.processor, tmp_path / "prompts")
    with pytest.raises(UserError, match="PROMPT_TUNING cannot be merged"):
        merging.merge(tmp_path / "prompts", tmp_path / "merged")


def test_a_classifier_adapter_keeps_its_head(tmp_path: Path) -> None:
    save(llama(), tokenizer(), tmp_path / "base")
    opened = load(tmp_path / "base", task="sequence-classification", labels=["no", "yes"], seed=5)
    model = peft.get_peft_model(opened.model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    options = {"task": opened.task, "labels": opened.labels, "base_fingerprint": opened.fingerprint}
    save(model, opened.processor, tmp_path / "adapter", **options)
    again = load(tmp_path / "adapter")
    assert (again.task, again.labels) == ("sequence-classification", ("no", "yes"))
    assert torch.equal(again.model(IDS).logits, model.eval()(IDS).logits)
    report = merging.merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.max_difference < 1e-4
    assert load(tmp_path / "merged").labels == ("no", "yes")
