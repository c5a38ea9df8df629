"""The example of docs/architecture.md: one file is a method."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from helpers import make_session, random_rows
from luthier.core import registry

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"


def example():
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "methods/objectives/label_smoothing.py" in line)
    end = next(i for i, line in enumerate(lines) if i > start and line and not line.startswith("    "))
    return textwrap.dedent("\n".join(lines[start:end]))


@pytest.fixture
def method(tmp_path):
    file = tmp_path / "label_smoothing.py"
    file.write_text(example(), encoding="utf-8")
    return registry.get("objective", f"{file}:LabelSmoothing")


def test_its_options_are_its_signature(method):
    assert method.slug == "label-smoothing"
    assert list(method.options.model_fields) == ["share"]
    with pytest.raises(ValueError, match="share"):
        method.build({"share": 1.0})


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_its_loss_and_gradient_are_those_of_torch(method, share):
    session, rows = make_session(objective=method.build({"share": share})), random_rows(6)
    batch = session.task.collate(rows.fetch(range(6)), range(6))
    loss = session.loss(batch)
    (loss.sum / loss.weight).backward()
    found = session.model.lm_head.weight.grad.clone()
    model = make_session().model
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state.reshape(-1, 16)[batch.position_N]
    wanted = torch.nn.functional.cross_entropy(model.lm_head(hidden), batch.target_N, label_smoothing=share)
    wanted.backward()
    torch.testing.assert_close((loss.sum / loss.weight).detach(), wanted.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, model.lm_head.weight.grad, atol=1e-6, rtol=1e-4)
