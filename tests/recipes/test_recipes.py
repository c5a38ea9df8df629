"""Every shipped recipe runs two steps and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import luthier
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.engine.loop import Interrupted

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = ["evaluation.limit=8", "evaluation.max_new_tokens=8", "evaluation.batch_rows=8", "data.limit=64"]


def methods_called(slug, axis):
    """The method of that name on an axis, if there is one."""
    return [registry.get(axis, slug)] if slug in registry.names(axis) else []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs_two_steps_and_resumes(recipe, tmp_path, monkeypatch):
    if "../shared" in recipe.read_text(encoding="utf-8") and not (ROOT.parent / "shared").is_dir():
        pytest.skip("its data are not here")
    if any(m.missing for axis in registry.AXES for m in methods_called(recipe.stem, axis)):
        pytest.skip("the package its method needs is not installed")
    monkeypatch.chdir(ROOT)
    training = ["training.max_steps=2", "training.save_steps=1", "training.eval_steps=null", "training.log_steps=1"]
    overrides = [*SMALL, *training, f"output={tmp_path / 'run'}", "evaluation.before=false"]
    from luthier.engine import loop

    step = loop.Trainer._step

    def stopped(self):
        if self.session.step == 1:
            raise Interrupted("stopped by the test")
        step(self)

    monkeypatch.setattr(loop.Trainer, "_step", stopped)
    with pytest.raises(Interrupted):
        luthier.tune(recipe, overrides=overrides, quiet=True)
    monkeypatch.setattr(loop.Trainer, "_step", step)
    with pytest.raises(UserError, match="already holds a run"):
        luthier.tune(recipe, overrides=overrides, quiet=True)
    run = luthier.tune(recipe, overrides=overrides, quiet=True, resume=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert run.metrics["training"]["steps"] == 2
    for name in ("recipe.yaml", "manifest.json", "evaluation.json", "report.html", "README.md", "model"):
        assert (tmp_path / "run" / name).exists(), name
