"""Reading and writing safetensors tensor by tensor, against the safetensors library and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from luthier.core.errors import UserError
from luthier.models.shards import Shards, ShardWriter, read_header


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kinds = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.int64, "e": torch.bool}
    return {name: (10 * torch.rand(3, 5)).to(kind) for name, kind in kinds.items()}


def test_header_and_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors(), file, metadata={"format": "pt"})
    shards = Shards(tmp_path)
    assert shards.names() == ["a", "b", "c", "d", "e"]
    assert shards.numel == 75
    assert shards.nbytes == 15 * (4 + 2 + 2 + 8 + 1)
    assert shards.header["b"].dtype == "BF16"
    assert shards.header["b"].shape == (3, 5)
    assert shards.metadata == {"format": "pt"}
    assert all(torch.equal(tensor, tensors()[name]) for name, tensor in shards)
    assert Shards(file).names() == shards.names()
    with pytest.raises(UserError, match=r"no tensor 'aa'\. Did you mean 'a'"):
        shards.tensor("aa")


def test_one_shard_becomes_a_plain_model_file(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(v, tensors()[k]) for k, v in load_file(tmp_path / "model.safetensors").items())


def test_many_shards_open_in_transformers(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=48,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    config.save_pretrained(tmp_path)
    with ShardWriter(tmp_path, max_bytes=4000) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(set(index["weight_map"].values())) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(Shards(tmp_path).tensor(name), model.state_dict()[name])


def test_views_and_doubles(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    with ShardWriter(tmp_path) as writer:
        writer.add("t", whole.T)
        with pytest.raises(ValueError, match="twice"):
            writer.add("t", whole)
    assert torch.equal(Shards(tmp_path).tensor("t"), whole.T)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle, which is never opened"):
        Shards(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    file = tmp_path / "model.safetensors"
    for content in (b"", b"abc", (2**60).to_bytes(8, "little") + b"{}"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            Shards(tmp_path)
    for text in (b"[1, 2]", b'{"a": 3}', b'{"a"'):
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(UserError, match="no readable safetensors header"):
            Shards(tmp_path)


def test_an_index_without_its_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(UserError, match=r"names model-1\.safetensors, which is not there"):
        Shards(tmp_path)
