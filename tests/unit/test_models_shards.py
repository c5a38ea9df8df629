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


def layout(state: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


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
    with ShardWriter(tmp_path, layout(tensors())) as writer:
        for name in writer.names:
            writer.write(name, tensors()[name])
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
    state = model.state_dict()
    with ShardWriter(tmp_path, layout(state), max_bytes=4000) as writer:
        for name in writer.names:
            for piece in state[name].flatten().split(100):
                writer.write(name, piece)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(set(index["weight_map"].values())) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(Shards(tmp_path).tensor(name), model.state_dict()[name])


def test_pieces_are_read_and_written_in_order(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    with ShardWriter(tmp_path, layout({"t": whole.T, "empty": torch.zeros(0), "one": torch.tensor(7)})) as writer:
        assert writer.names == ["one", "t", "empty"]
        writer.write("one", torch.tensor(7))
        writer.write("t", whole.T[:1])
        writer.write("t", whole.T[1:])
        writer.write("empty", torch.zeros(0))
    shards = Shards(tmp_path)
    assert torch.equal(shards.tensor("t"), whole.T)
    assert shards.piece("t", 1, 3).tolist() == whole.T.flatten()[1:3].tolist()
    assert shards.piece("t", 4, 99).tolist() == whole.T.flatten()[4:].tolist()
    assert shards.piece("t", 99, 100).numel() == 0
    assert shards.piece("one", 0, 1).tolist() == [7]
    shards.close()


@pytest.mark.parametrize("name", tensors())
def test_a_piece_is_the_tensor_whatever_its_type(tmp_path: Path, name: str) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    piece = Shards(tmp_path).piece(name, 2, 11)
    assert torch.equal(piece, tensors()[name].flatten()[2:11])


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    plan = layout({"a": torch.zeros(4), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="not the turn of tensor 'b'"), ShardWriter(tmp_path, plan) as writer:
        writer.write("b", torch.zeros(2))
    with pytest.raises(ValueError, match=r"announced as torch\.float32"), ShardWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="longer than announced"), ShardWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(5))
    with pytest.raises(ValueError, match="'a' is not complete"), ShardWriter(tmp_path, plan) as writer:
        writer.write("a", torch.zeros(3))


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
