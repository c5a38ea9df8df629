"""Drift against norms and divergences worked out in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luthier.core import registry
from luthier.core.protocols import Batch
from luthier.methods.analysis.drift import divergence, log_probabilities, part_of, weight_changes


class Source:
    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = {name.replace("__", "."): t for name, t in tensors.items()}

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class Out:
    """Outputs over given logits, handed out in chunks of three positions."""

    def __init__(self, logits_NV: np.ndarray) -> None:
        self.logits = torch.tensor(logits_NV)

    def over_vocabulary(self, fn):
        parts = torch.arange(len(self.logits)).split(3)
        return torch.cat([fn(self.logits[index_C], index_C) for index_C in parts])


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3", "model.layers.*.mlp.up_proj"),
        ("transformer.h.11.ln_1.bias", "transformer.h.11", "transformer.h.*.ln_1"),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("model.embed_tokens.weight", "model.embed_tokens", "model.embed_tokens"),
        ("classifier", "classifier", "classifier"),
        ("encoder.layer.1.output.dense2.weight", "encoder.layer.1", "encoder.layer.*.output.dense2"),
    ],
)
def test_parts(name: str, block: str, kind: str) -> None:
    assert (part_of(name, "block"), part_of(name, "kind"), part_of(name, "tensor")) == (block, kind, name)


def test_weight_changes_by_hand() -> None:
    base = Source(h__0__w=torch.tensor([3.0, 4.0]), h__0__b=torch.tensor([1.0]), old__w=torch.ones(2))
    tuned = Source(
        h__0__w=torch.tensor([3.0, 1.0]), h__0__b=torch.tensor([5.0]), old__w=torch.ones(3), new__w=torch.ones(1)
    )
    sums, skipped = weight_changes(base, tuned, "block")
    assert {part: value.tolist() for part, value in sums.items()} == {"h.0": [3.0, 9.0 + 16.0, 26.0, 2.0]}
    assert skipped == ["new.w", "old.w"]


def test_small_changes_of_bfloat16_weights_are_measured_in_float64() -> None:
    base = Source(w=torch.full((4096,), 256.0, dtype=torch.bfloat16))
    tuned = Source(w=torch.full((4096,), 258.0, dtype=torch.bfloat16))
    sums, _ = weight_changes(base, tuned, "tensor")
    assert sums["w"][1] == 4096 * 4.0


def test_divergence_against_numpy() -> None:
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(7), 5), generator.dirichlet(np.ones(7), 5)
    found = divergence(torch.tensor(np.log(p)), torch.tensor(np.log(q)))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(1), rtol=1e-12)
    masked = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    even = torch.full((1, 2), np.log(0.5), dtype=torch.float64)
    assert divergence(masked, even).item() == pytest.approx(np.log(2))


def test_only_chosen_positions_are_kept() -> None:
    logits = np.random.default_rng(1).normal(size=(8, 4))
    found = log_probabilities(Out(logits), torch.tensor([1, 3, 7]))
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found, expected[[1, 3, 7]], atol=1e-12)


def batch(sequence: list[int]) -> Batch:
    n = len(sequence)
    return Batch({}, torch.arange(n), torch.zeros(n, dtype=torch.long), torch.ones(n), torch.tensor(sequence),
                 torch.arange(max(sequence) + 1))  # fmt: skip


def test_the_table() -> None:
    generator = np.random.default_rng(2)
    pairs = [(batch([0, 0, 1, 1, 1]), generator.normal(size=(5, 6)), generator.normal(size=(5, 6))) for _ in range(4)]
    ctx = SimpleNamespace(
        sources=lambda run: {
            "base": Source(a__w=torch.tensor([3.0, 4.0])),
            "tuned": Source(a__w=torch.tensor([3.0, 5.0])),
        },
        both=lambda run: ((b, Out(x), Out(y)) for b, x, y in pairs),
    )
    table = registry.get("analysis", "drift").build({}).run([SimpleNamespace(folder=Path("runs/one"))], ctx)
    found = {(quantity, part): (value, n, low, high) for _, quantity, part, value, n, low, high, _ in table.rows}
    assert found["weight change", "a"][:2] == (1.0, 2)
    assert found["relative weight change", "all"][0] == pytest.approx(0.2)
    assert found["changed weights", "a"][0] == 0.5
    softmax = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for _, x, _ in pairs]
    tuned = [np.exp(y) / np.exp(y).sum(1, keepdims=True) for _, _, y in pairs]
    expected = np.concatenate([(t * np.log(t / b)).sum(1) for b, t in zip(softmax, tuned, strict=True)])
    value, n, low, high = found["KL(tuned|base)", "held-out rows"]
    assert value == pytest.approx(expected.mean())
    assert n == 20
    assert low < value < high
    same = np.concatenate([b.argmax(1) == t.argmax(1) for b, t in zip(softmax, tuned, strict=True)])
    assert found["same most likely token", "held-out rows"][0] == pytest.approx(same.mean())
    json.dumps(table.rows, allow_nan=False)


def test_a_run_without_change_and_without_held_out_rows() -> None:
    weights = Source(a__w=torch.zeros(3), steps=torch.tensor([1]))
    ctx = SimpleNamespace(sources=lambda run: {"base": weights, "tuned": weights}, both=lambda run: [])
    table = registry.get("analysis", "drift").build({"by": "tensor"}).run([SimpleNamespace(folder=Path("x"))], ctx)
    assert {row[1] for row in table.rows} == {"weight change", "relative weight change", "changed weights"}
    assert all(row[3] in (0.0, None) for row in table.rows)
    assert "steps" in table.notes[0]
