"""The memory estimate against measured peaks, and the counts of operations and trained weights worked out by hand."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from luthier.models import estimate as est
from luthier.models.info import ModelInfo, inspect

MEASURE = r"""
import ctypes, gc, os, threading, time, torch, transformers
from luthier.core.protocols import Batch
from luthier.engine.head import Head
from luthier.methods.objectives.sft import SupervisedFineTuning

class Peak(threading.Thread):
    # The largest resident size seen; the kernel does not keep its own high-water mark everywhere.

    def __init__(self):
        super().__init__(daemon=True)
        self.statm, self.page, self.stopped = open("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE"), False
        self.before = self.peak = self.resident()

    def resident(self):
        self.statm.seek(0)
        return int(self.statm.read().split()[1]) * self.page

    def run(self):
        while not self.stopped:
            self.peak = max(self.peak, self.resident())
            time.sleep(0.001)

def run(config, R, T):
    model, sft = transformers.LlamaForCausalLM(config), SupervisedFineTuning()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        ids = torch.randint(config.vocab_size, (R, T))
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.reshape(R * T, -1)
        N = R * T
        sequence_N = torch.arange(N) // T
        batch = Batch({}, torch.arange(N), ids.reshape(-1), torch.ones(N), sequence_N, torch.arange(R))
        head = Head(model.lm_head.weight)
        head.positionwise(hidden, batch, lambda out, cut: sft.loss(out, cut, None)).sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

def config(H, L, I, V):
    return transformers.LlamaConfig(
        hidden_size=H, num_hidden_layers=L, intermediate_size=I, vocab_size=V, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=False,
    )

torch.set_num_threads(1)
run(config(32, 1, 64, 128), 2, 16)
gc.collect()
for shape in ((256, 3, 704, 4000, 2, 256), (128, 2, 352, 24000, 1, 128)):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    watch = Peak()
    watch.start()
    run(config(*shape[:4]), *shape[4:])
    watch.stopped = True
    print(watch.peak - watch.before)
"""


def info(hidden: int, layers: int, intermediate: int, vocabulary: int, parameters: int) -> ModelInfo:
    known = {f.name: None for f in dataclasses.fields(ModelInfo)}
    sizes = {"hidden": hidden, "layers": layers, "intermediate": intermediate, "vocabulary": vocabulary}
    return ModelInfo(**{**known, **sizes, "heads": 8, "key_value_heads": 4, "parameters": parameters, "tied": False})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size as Linux gives it")
def test_memory_is_within_a_factor_two_of_the_measured_peak() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    measured = [int(line) for line in done.stdout.split()]
    shapes = ((256, 3, 704, 4000, 2, 256), (128, 2, 352, 24000, 1, 128))
    for peak, (hidden, layers, wide, vocabulary, rows, length) in zip(measured, shapes, strict=True):
        layer = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * wide + 2 * hidden
        weights = layers * layer + 2 * vocabulary * hidden + hidden
        about = info(hidden, layers, wide, vocabulary, weights)
        found = est.training_memory(about, trained=weights, rows=rows, length=length).total
        print(f"estimated {found / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
        assert 0.5 < found / peak < 2, (found / 1e6, peak / 1e6)


def test_memory_by_hand() -> None:
    about = info(8, 2, 16, 100, 1000)
    found = est.training_memory(about, trained=400, rows=3, length=5, supervised=7, optimizer="sgd")
    assert (found.weights, found.gradients, found.optimizer) == (4000, 1600, 1600)
    # Per token and layer 9*8 + 2*4 + 4*16 = 144; two layers and the working set 4*16 + 4*8; masks 4 * 2 * 3 * 25.
    assert found.activations == 4 * 15 * (2 * 144 + 96) + 600
    assert found.head == 7 * 400 + 4 * (800 + 3 * 7 * 8)
    assert found.total == 4000 + 1600 + 1600 + found.activations + found.head
    kept = est.training_memory(about, trained=400, rows=3, length=5, supervised=7, keeps_attention=True)
    assert kept.activations - found.activations == 3 * 4 * 2 * 3 * 25 * 8
    assert kept.optimizer == 3200


def test_operations_by_hand() -> None:
    about = info(8, 2, 16, 100, 2600)
    # 1,000 weights outside the two embeddings of 800: forward 2,000 + 2 * 2 * 10 * 8 = 2,320 per token.
    full = est.step_operations(about, tokens=50, supervised=20, length=10, trained_share=1.0)
    assert full == 50 * 2320 * 3 + 6 * 800 * 20
    assert est.step_operations(about, tokens=50, supervised=0, length=10, trained_share=0.0) == 50 * 2320 * 2


def test_matrix_peak_is_a_rate() -> None:
    assert 1e8 < est.matrix_peak(size=128, seconds=0.02) < 1e16


class _Half:
    def apply(self, model: torch.nn.Module, ctx: object) -> torch.nn.Module:
        model.model.layers[0].requires_grad_(True)
        return model


class _Looks:
    def apply(self, model: torch.nn.Module, ctx: object) -> torch.nn.Module:
        raise NotImplementedError if float(model.model.embed_tokens.weight.sum()) else None


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=32,
        vocab_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def plan(parameters: object, **training: object) -> SimpleNamespace:
    from luthier.core.protocols import Needs

    settings = {
        "batch_rows": 4,
        "batch_tokens": None,
        "accumulation": 2,
        "optimizer": "adamw",
        "precision": "fp32",
        "gradient_checkpointing": False,
        "head_chunk": None,
        **training,
    }
    model = SimpleNamespace(dtype="auto", attention="auto")
    recipe = SimpleNamespace(seed=0, training=SimpleNamespace(**settings), model=model)
    choice = SimpleNamespace(build=lambda: parameters, needs=Needs())
    objective = [SimpleNamespace(needs=Needs(positionwise=True))]
    return SimpleNamespace(
        recipe=recipe, parameters=[choice], objective=objective, task="causal-lm", choices=lambda: [choice, *objective]
    )


class _Prepared:
    lengths = np.array([3, 9, 5, 7], np.int32)

    def __len__(self) -> int:
        return 4

    def fetch(self, index: list[int]) -> dict[str, list]:
        return {"input_ids": [np.zeros(self.lengths[i]) for i in index], "spans": [np.array([1, 3])] * len(index)}


def test_estimate_of_a_plan(tiny: Path) -> None:
    about = inspect(tiny)
    found = est.estimate(about, plan(_Half()), _Prepared(), steps=10, measure=False)
    # One layer: 4 * 16 * 16 (attention) + 3 * 16 * 32 (MLP) + 2 * 16 (norms); embeddings of 64 * 16, a final norm.
    assert found.trained == 1024 + 1536 + 32
    assert found.parameters == 2 * 2592 + 64 * 16 + 16 == about.parameters
    assert found.largest_micro_batch == (2, 9)
    assert found.tokens == 10 * 4 * 6
    assert found.seconds is None
    assert found.to_dict()["memory"]["total"] == found.memory.total
    assert est.supervised_share(_Prepared()) == pytest.approx(8 / 24)


def test_a_method_that_reads_weights_counts_all(tiny: Path) -> None:
    trained, _, note = est.count_trained(inspect(tiny), plan(_Looks()))
    assert trained == inspect(tiny).parameters
    assert "all weights counted" in note
