"""Rows that lack what a method reads are refused when data are read, by ``luthier check`` and before any weight."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from luthier.core.errors import UserError
from luthier.lab.tokenizer import tokenizer

ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    """The folder of a model whose weights nobody may open."""
    folder = tmp_path / "model"
    words = tokenizer(64)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)

    def opened(*args, **options):
        raise AssertionError("weights were opened")

    monkeypatch.setattr("luthier.models.load.load", opened)
    return str(folder)


NEGATIVES = r"row 1: no negative available"
NEEDY = [
    ({"objective": "discriminative-ft"}, NEGATIVES),
    ({"objective": {"learning-from-undesirable": {"base_objective": "discriminative-ft"}}}, NEGATIVES),
    ({"objective": "preference-oriented-sft"}, r"row 1: .*score"),
    ({"objective": "cross-lingual-optimization"}, r"row 1: no answer in the other language"),
    ({"objective": "fault-aware-ft"}, r"no training row has a wrong answer"),
    ({"objective": "tl-training"}, r"no training row has key tokens"),
    ({"objective": {"sorted-ft": {"exits": [1, 2], "inner": "tl-training"}}}, r"no training row has key tokens"),
    ({"transforms": ["tl-training"]}, r"no training row has key tokens"),
]


@pytest.mark.parametrize(("sections", "message"), NEEDY, ids=lambda v: v if isinstance(v, str) else str(v)[:60])
def test_missing_columns_are_refused_before_weights_are_opened(model, sections, message, tmp_path):
    recipe = {"model": model, "data": {"train": ROWS, "keep": "none"}, "output": str(tmp_path / "run")}
    for call in (luthier.check, lambda r: luthier.tune(r, quiet=True)):
        with pytest.raises(UserError, match=message) as error:
            call({**recipe, **sections})
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_rows_with_the_columns_pass(model):
    rows = [{**row, "negatives": ["x", "y"]} for row in ROWS]
    found = luthier.check({"model": model, "data": {"train": rows, "keep": "none"}, "objective": "discriminative-ft"})
    assert found["steps"] > 0
