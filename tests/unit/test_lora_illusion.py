"""Intruder dimensions: planted ones are found, counted as numpy counts them, and taken out again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luthier.core.errors import UserError
from luthier.core.rng import stream
from luthier.functional import intruders as spectra
from luthier.methods.analysis.lora_illusion import IntruderDimensions
from luthier.methods.weights.lora_illusion import ShrinkIntruders


def structured(rng, out=12, width=8):
    """A matrix with clearly different singular values."""
    u, _ = np.linalg.qr(rng.normal(size=(out, width)))
    v, _ = np.linalg.qr(rng.normal(size=(width, width)))
    return torch.tensor(u * (2.0 ** -np.arange(width)) @ v.T)


def planted(w0, rng, size=3.0):
    """The matrix plus one direction orthogonal to all of its left ones."""
    u0 = np.linalg.svd(np.asarray(w0), full_matrices=True)[0]
    v = rng.normal(size=w0.shape[1])
    return w0 + size * torch.outer(torch.tensor(u0[:, -1]), torch.tensor(v / np.linalg.norm(v)))


def by_numpy(w0, w1, k, eps):
    u0, u1 = (np.linalg.svd(np.asarray(w), full_matrices=False)[0] for w in (w0, w1))
    return [j for j in range(k) if np.abs(u1[:, j] @ u0).max() < eps]


def test_a_planted_direction_is_found_and_nothing_else():
    rng = np.random.default_rng(0)
    w0 = structured(rng)
    assert spectra.intruders(spectra.spectrum(w0, planted(w0, rng)), 8, 0.5) == [0]
    assert spectra.intruders(spectra.spectrum(w0, w0), 8, 0.5) == []
    u, s, vt = np.linalg.svd(np.asarray(w0), full_matrices=False)
    other = torch.tensor(u * (s**2 + 0.1) @ vt)  # the same directions, other sizes
    assert spectra.intruders(spectra.spectrum(w0, other), 8, 0.5) == []


def test_counts_are_those_of_numpy_and_rise_with_k_and_eps():
    rng = np.random.default_rng(1)
    w0 = structured(rng)
    w1 = w0 + 0.3 * torch.tensor(rng.normal(size=w0.shape))
    found = spectra.spectrum(w0, w1)
    for eps in (0.3, 0.5, 0.7, 0.9):
        for k in (1, 4, 8):
            assert spectra.intruders(found, k, eps) == by_numpy(w0, w1, k, eps)
    counts = [[len(spectra.intruders(found, k, eps)) for k in range(1, 9)] for eps in (0.3, 0.5, 0.7, 0.9)]
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (np.diff(counts, axis=1) >= 0).all()
    assert counts[-1][-1] > 0


def test_rescaling_is_of_the_tuned_directions():
    rng = np.random.default_rng(2)
    w0 = structured(rng)
    w1 = planted(w0, rng)
    found = spectra.spectrum(w0, w1)
    assert spectra.rescaled(w1, found, [0, 2], 1.0) is w1
    gone = spectra.rescaled(w1, found, [0, 2], 0.0)
    u, s, vt = (torch.tensor(x) for x in np.linalg.svd(np.asarray(w1), full_matrices=False))
    assert float((u[:, [0, 2]].T @ gone @ vt[[0, 2]].T).abs().max()) < 1e-12
    assert float(w1.norm() ** 2 - gone.norm() ** 2) == pytest.approx(float(s[0] ** 2 + s[2] ** 2))
    half = spectra.rescaled(w1, found, [0], 0.5)
    assert torch.linalg.svdvals(half).max() == pytest.approx(max(float(s[0]) / 2, float(s[1])))


def test_controls_are_as_many_directions_of_the_base():
    rng = np.random.default_rng(3)
    w0 = structured(rng)
    found = spectra.spectrum(w0, planted(w0, rng))
    chosen = spectra.controls(found, 8, 0.5)
    assert len(chosen) == 1
    assert chosen[0] == int(found.cosine_R.argmax())


def test_ranks_by_hand():
    assert spectra.effective_rank(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2.0)
    assert spectra.stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)
    assert spectra.effective_rank(torch.zeros(2)) == spectra.stable_rank(torch.zeros(2)) == 0.0


def test_sides_and_transposed_modules():
    rng = np.random.default_rng(4)
    w0 = structured(rng)
    w1 = planted(w0, rng)
    # The planted right direction lies in the base's right space, which is complete: nothing new there but misalignment.
    left, right, both = (spectra.spectrum(w0, w1, side).cosine_R for side in ("left", "right", "both"))
    assert float(left[0]) < float(right[0])
    assert float(both[0]) <= (float(left[0]) + float(right[0])) / 2 + 1e-12
    assert torch.equal(spectra.oriented(w0, "h.0.attn.c_attn.weight"), w0.T)
    assert spectra.oriented(w0, "layers.0.q_proj.weight") is w0


class Source:
    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shapes(self):
        return {n: tuple(t.shape) for n, t in self.tensors.items()}

    def tensor(self, name):
        return self.tensors[name]


NAMES = [f"model.layers.{i}.self_attn.{p}.weight" for i in range(2) for p in ("q_proj", "k_proj")]


@pytest.fixture
def models():
    rng = np.random.default_rng(5)
    base = {name: structured(rng) for name in NAMES} | {"lm_head.weight": structured(rng)}
    tuned = {n: (planted(w, rng) if n == NAMES[1] or n == "lm_head.weight" else w) for n, w in base.items()}
    return Source(base), Source(tuned)


def context(models):
    return SimpleNamespace(
        sources=lambda run: dict(zip(("base", "tuned"), models, strict=True)),
        rng=lambda name, *keys: stream(0, name, *keys),
    )


def test_the_table_has_every_matrix_of_the_blocks_and_a_total(models):
    run = SimpleNamespace(folder=Path("run"))
    table = IntruderDimensions(k=3, curve=[0.2]).run([run], context(models))
    counts = {row[1]: row[2] for row in table.rows}
    assert counts == {**dict.fromkeys(NAMES, 0), NAMES[1]: 1, "all": 1}  # and not the head
    row = next(r for r in table.rows if r[1] == NAMES[1])
    assert row[4] == pytest.approx(float(torch.linalg.svdvals(models[1].tensor(NAMES[1]))[0]))
    assert row[6] == pytest.approx(1.0)
    assert row[7] == pytest.approx(1.0)
    assert row[8] == pytest.approx(3.0 / float(models[0].tensor(NAMES[1]).norm()))
    count = sum(len(by_numpy(models[0].tensor(n), models[1].tensor(n), 3, 0.2)) for n in NAMES)
    assert table.notes[0] == f"run: eps 0.2 finds {count} intruders"
    # The planted direction is larger than the whole base, and so is noise of its size.
    floor = {r[1]: r[3] for r in table.rows}
    assert floor["all"] == floor[NAMES[1]] > 0
    assert "so the base's spectrum is too flat" in table.notes[1]
    with pytest.raises(UserError, match="no matrix of the model fits modules: 'nothing'"):
        IntruderDimensions(modules="nothing").run([run], context(models))


def test_the_operation_shrinks_intruders_alone(models):
    base, tuned = models

    def apply(**options):
        op = ShrinkIntruders(k=3, **options)
        op.prepare({"base": base, "tuned": tuned}, None)
        return {n: op.tensor(n, {"base": base.tensor(n), "tuned": tuned.tensor(n)}, None) for n in base.names()}

    same = apply(factor=1.0)
    assert all(same[n] is tuned.tensor(n) for n in base.names())
    gone = apply(factor=0.0)
    assert [n for n in base.names() if not torch.equal(gone[n], tuned.tensor(n))] == [NAMES[1]]
    assert spectra.intruders(spectra.spectrum(base.tensor(NAMES[1]), gone[NAMES[1]]), 3, 0.5) == []
    control = apply(factor=0.0, direction="control")
    assert spectra.intruders(spectra.spectrum(base.tensor(NAMES[1]), control[NAMES[1]]), 1, 0.5) == [0]


def test_the_repair_is_pefts_on_a_merged_adapter():
    """peft scales the same directions and then cuts to the adapter's rank: with enough rank both are equal."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(8, 12, bias=False))
    rng = np.random.default_rng(6)
    w0 = structured(rng).float()
    model.layer.weight.data = w0.clone()
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["layer"]))
    change = planted(w0.double(), rng) - w0.double()
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    layer = tuned.base_model.model.layer
    layer.lora_B["default"].weight.data = (u * s.sqrt()).float()
    layer.lora_A["default"].weight.data = (s.sqrt()[:, None] * vt).float()
    reduce_intruder_dimension(tuned, top_k=3, threshold_epsilon=0.5, mitigation_lambda=0.4)
    repaired = w0 + layer.get_delta_weight(tuned.active_adapter)
    w1 = w0 + change.float()
    found = spectra.spectrum(w0, w1)
    assert spectra.intruders(found, 3, 0.5) == [0]
    torch.testing.assert_close(repaired.detach(), spectra.rescaled(w1, found, [0], 0.4), atol=1e-5, rtol=1e-4)


def test_bad_matrices_are_refused_by_name():
    with pytest.raises(UserError, match=r"'x' is \(2, 3\) in the base and \(3, 2\) tuned"):
        spectra.spectrum(torch.zeros(2, 3), torch.zeros(3, 2), name="x")
    with pytest.raises(UserError, match="'x' holds a number that is not finite"):
        spectra.spectrum(torch.zeros(2, 2), torch.full((2, 2), torch.nan), name="x")
