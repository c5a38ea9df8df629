"""Opening models: the four tasks, adapters, and one clear line for everything that cannot be opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from luthier.core.errors import UserError
from luthier.models.load import fingerprint, inspect, load
from luthier.models.save import save

STORIES = Path(__file__).resolve().parents[2].parent / "shared" / "models" / "stories260k"


def tokenizer(size: int = 40) -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", *(f"w{i}" for i in range(size - 2))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def llama(**changes: object) -> transformers.LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaConfig(
        **{
            **sizes,
            "num_key_value_heads": 1,
            "vocab_size": 48,
            "max_position_embeddings": 64,
            "bos_token_id": 2,
            "eos_token_id": 1,
            **changes,
        }
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=True, pad_token_id=0))
    return save(model, tokenizer(), tmp_path / "base")


def refused(spec: str | Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(file: Path, **changes: object) -> None:
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, **changes}))


def test_causal_lm(base: Path) -> None:
    found = load(base)
    assert (found.task, found.labels, found.base, found.notes) == ("causal-lm", (), None, ())
    assert found.processor("w0 w1").input_ids == [2, 3]
    assert not found.model.training
    assert found.model.dtype == torch.float32
    assert found.fingerprint == fingerprint(base)


def test_inspect_agrees_with_the_opened_model(base: Path) -> None:
    about, model = inspect(base), load(base).model
    assert about.parameters == sum(p.numel() for p in model.parameters())
    assert about.bytes == 4 * about.parameters
    assert (about.task, about.vocabulary, about.tokenizer_size, about.max_length) == ("causal-lm", 48, 40, 64)
    assert (about.hidden, about.layers, about.heads, about.key_value_heads, about.intermediate) == (16, 2, 2, 1, 24)
    assert about.tied
    assert about.special_tokens == {"bos": 2, "eos": 1, "pad": 0}
    assert not about.chat_template
    json.dumps(about.to_dict())


def test_inspect_needs_no_torch(base: Path) -> None:
    code = "import sys; from luthier.models.info import inspect, fingerprint; inspect(sys.argv[1]); "
    code += "fingerprint(sys.argv[1]); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(base)], check=False).returncode == 0


def test_the_folder_s_place_does_not_change_the_fingerprint_but_a_weight_does(base: Path, tmp_path: Path) -> None:
    first = fingerprint(base)
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    (moved / "notes.txt").write_text("not part of the model")
    assert fingerprint(moved) == first
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(moved) != first


def test_classifier_labels_keep_their_meaning(base: Path, tmp_path: Path) -> None:
    made = load(base, task="sequence-classification", labels=["no", "yes", "maybe"], seed=3)
    assert made.labels == ("no", "yes", "maybe")
    assert "new sequence-classification head for 3 classes" in made.notes[0]
    assert made.model.config.pad_token_id == 0
    save(made.model, made.processor, tmp_path / "classifier")
    ids = torch.tensor([[2, 3, 4]])
    first = load(tmp_path / "classifier")
    assert (first.task, first.labels, first.notes) == ("sequence-classification", ("no", "yes", "maybe"), ())
    other = load(tmp_path / "classifier", labels=["maybe", "no", "yes"])
    assert other.labels == ("maybe", "no", "yes")
    assert other.model.config.label2id == {"maybe": 0, "no": 1, "yes": 2}
    assert torch.equal(other.model(ids).logits, first.model(ids).logits[:, [2, 0, 1]])
    replaced = load(tmp_path / "classifier", labels=["a", "b", "c"])
    assert "new" in replaced.notes[0]
    assert not torch.equal(replaced.model.score.weight, first.model.score.weight)


def test_default_label_names_serve_numbered_classes(base: Path, tmp_path: Path) -> None:
    made = load(base, task="sequence-classification", labels=["x", "y"])
    save(made.model, made.processor, tmp_path / "c")
    edit(
        tmp_path / "c" / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1}
    )
    again = load(tmp_path / "c", labels=["0", "1"])
    assert torch.equal(again.model.score.weight, made.model.score.weight)
    assert again.notes == ()


def test_a_new_head_is_a_function_of_the_seed_and_leaves_the_random_state_alone(base: Path) -> None:
    options = {"task": "token-classification", "labels": ["O", "B-x"]}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    weights = [load(base, seed=seed, **options).model.score.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_image_classification_without_torchvision(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    save(transformers.ViTForImageClassification(config), processor, tmp_path / "vit")
    found = load(tmp_path / "vit")
    assert (found.task, found.labels) == ("image-classification", ("cat", "dog"))
    grey = Image.fromarray(np.full((20, 30, 3), 255, np.uint8))
    pixels = found.processor(images=[grey], return_tensors="pt")["pixel_values"]
    # White is 1 after scaling, and (1 - 0.5) / 0.5 = 1 after normalising.
    assert pixels.shape == (1, 3, 16, 16)
    assert torch.allclose(pixels, torch.ones_like(pixels))
    assert found.model(pixels).logits.shape == (1, 2)
    assert "cannot do causal-lm" in refused(tmp_path / "vit", task="causal-lm")
    three = load(tmp_path / "vit", labels=["a", "b", "c"])
    assert three.model(pixels).logits.shape == (1, 3)


def test_tokens_beyond_the_embedding_get_rows(base: Path) -> None:
    old = load(base).model.get_input_embeddings().weight.detach()
    bigger = transformers.AutoTokenizer.from_pretrained(base)
    bigger.add_tokens([f"new{i}" for i in range(10)])
    bigger.save_pretrained(base)
    found = load(base)
    weight = found.model.get_input_embeddings().weight
    assert weight.shape == (50, 16)
    assert found.model.get_output_embeddings().weight is weight
    assert torch.equal(weight[:48], old)
    assert torch.allclose(weight[49], old.mean(0), atol=1e-7)
    assert "2 rows were added" in found.notes[0]


def test_reduced_precision(base: Path, tmp_path: Path) -> None:
    plain = load(base)
    save(plain.model, plain.processor, tmp_path / "bf16", dtype="bfloat16")
    assert inspect(tmp_path / "bf16").dtype == "bfloat16"
    found = load(tmp_path / "bf16")
    assert found.model.dtype == torch.float32
    assert "stored as bfloat16, loaded as float32" in found.notes[0]
    assert load(tmp_path / "bf16", dtype="bfloat16").model.dtype == torch.bfloat16


def test_what_cannot_be_opened_is_one_line(base: Path, tmp_path: Path) -> None:
    assert "Did you mean 'base'" in refused(str(tmp_path / "bse"))
    assert "not a model folder" in refused(tmp_path)
    assert f"Did you mean {base}" in refused(tmp_path)
    assert "is a file" in refused(base / "config.json")
    assert "HF_HUB_OFFLINE" in refused("nobody/nothing") or "hub" in refused("nobody/nothing")
    assert "Did you mean 'causal-lm'" in refused(base, task="causal")
    assert "Accepted: auto, float32" in refused(base, dtype="float3")
    assert "cannot do image-classification" in refused(base, task="image-classification")
    assert "give the class names" in refused(base, task="sequence-classification")
    if not __import__("importlib").util.find_spec("flash_attn"):
        assert "pip install 'flash-attn'" in refused(base, attention="flash_attention_2")


def test_damaged_folders(base: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(base, tmp_path / name))

    folder = copy("short")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    assert "cut short" in refused(folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    assert "not a whole safetensors file" in refused(folder)

    folder = copy("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refused(folder)

    folder = copy("lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "'model.layers.1.mlp.up_proj.weight'" in refused(folder)

    folder = copy("misshapen")
    edit(folder / "config.json", intermediate_size=32)
    assert "cannot be opened" in refused(folder) or "shape" in refused(folder)

    folder = copy("wordless")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(folder)

    folder = copy("config")
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)
    (folder / "config.json").write_text("[]")
    assert "JSON object" in refused(folder)

    folder = copy("unknown")
    edit(folder / "config.json", model_type="lama")
    assert "Did you mean 'llama'" in refused(folder)

    folder = copy("kind")
    edit(folder / "config.json", hidden_size="sixteen")
    refused(folder)

    folder = copy("taskless")
    edit(folder / "config.json", architectures=["LlamaModel"])
    assert "tells no task" in refused(folder)
    assert load(folder, task="causal-lm").task == "causal-lm"


def test_a_body_without_head_is_no_causal_lm(tmp_path: Path) -> None:
    model = transformers.LlamaModel(llama(tie_word_embeddings=False))
    save(model, tokenizer(), tmp_path / "body")
    assert "'lm_head.weight'" in refused(tmp_path / "body", task="causal-lm")


def adapter(base: Path, folder: Path, **options: object) -> peft.PeftModel:
    opened = load(base)
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(opened.model, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    save(model, opened.processor, folder, task="causal-lm", base_fingerprint=opened.fingerprint)
    return model


def test_adapters_open_with_their_base(base: Path, tmp_path: Path) -> None:
    model = adapter(base, tmp_path / "adapter")
    found = load(tmp_path / "adapter")
    ids = torch.tensor([[2, 3, 4]])
    assert (found.base, found.task) == (base, "causal-lm")
    assert torch.equal(found.model(ids).logits, model.eval()(ids).logits)
    about = inspect(tmp_path / "adapter")
    # Rank 2 on two layers of 16 -> 16.
    assert (about.adapter, about.parameters) == ("LORA", inspect(base).parameters + 2 * 2 * (16 + 16))
    assert found.fingerprint != fingerprint(base)


def test_an_adapter_s_own_base_is_asked_for(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert "another state of its base" in refused(tmp_path / "adapter")


def test_an_adapter_with_lost_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    assert "1 tensors of the adapter" in refused(tmp_path / "adapter")


def test_an_adapter_with_new_tokens_brings_their_rows(base: Path, tmp_path: Path) -> None:
    bigger = transformers.AutoTokenizer.from_pretrained(base)
    bigger.add_tokens([f"new{i}" for i in range(10)])
    opened = load(base)
    opened.model.resize_token_embeddings(len(bigger))
    model = peft.get_peft_model(opened.model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    save(model, bigger, tmp_path / "adapter", base_fingerprint=opened.fingerprint)
    ids = torch.tensor([[2, 49]])
    found = load(tmp_path / "adapter")
    assert torch.equal(found.model(ids).logits, model.eval()(ids).logits)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the shared checkpoint")
def test_a_real_pretrained_checkpoint() -> None:
    found = load(STORIES)
    ids = found.processor("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        text = found.processor.decode(found.model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    assert "there was a little" in text
    assert inspect(STORIES).parameters == 260032
