"""The documentation is complete and current."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from luthier import lab
from luthier.cli.main import app
from luthier.core import registry
from luthier.recipe import schema

ROOT = Path(__file__).resolve().parents[2]
OWN_PAGE = ("objective", "transform", "selection", "parameters", "data", "weights", "analysis")


@pytest.mark.parametrize("method", [m for m in registry.all_methods() if m.axis in OWN_PAGE], ids=lambda m: m.slug)
def test_every_method_has_a_page_and_a_recipe(method):
    page = ROOT / "docs" / "methods" / f"{method.slug}.md"
    assert page.is_file()
    text = page.read_text(encoding="utf-8")
    missing = [name for name in method.options.model_fields if f"`{name}`" not in text]
    assert missing == []
    assert (ROOT / "recipes" / f"{method.slug}.yaml").is_file()


BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"))


@pytest.mark.parametrize(("path", "text"), BUILD["pages"](), ids=lambda value: getattr(value, "name", None))
def test_made_pages_are_current(path, text):
    assert path.read_text(encoding="utf-8") == text, "run `make docs`"


def test_the_recipe_page_names_every_key_with_its_bounds():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for section in (schema.Recipe, schema.Model, schema.Data, schema.Training, schema.EarlyStopping, schema.Evaluation):
        assert [key for key in section.model_fields if f"| `{key}` |" not in text] == []
    assert "| `beta1` | float — at least 0, below 1 | `0.9` |" in text
    assert "any —" not in text


def test_the_lab_page_names_every_task_and_base():
    text = (ROOT / "docs" / "lab.md").read_text(encoding="utf-8")
    assert [name for name in lab.names() if f"### lab:{name}\n" not in text] == []
    assert [name for name in lab.BASES if f"`lab:{name}`" not in text] == []


def test_the_command_page_names_every_command():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert [c.name for c in app.registered_commands if f"\n## {c.name}\n" not in text] == []


def test_the_evaluation_page_names_every_verifier():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert [name for name in registry.names("reward") if f"| `{name}` |" not in text] == []


def test_the_engine_knows_no_method_by_name():
    slugs = {m.slug for m in registry.all_methods()} - {"full", "sft", "sample", "exact", "json", "text"}
    for path in (ROOT / "src" / "luthier" / "engine").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        named = [slug for slug in slugs if f'"{slug}"' in text or f"'{slug}'" in text]
        assert named == [], path.name


def test_methods_do_not_import_the_engine():
    for path in (ROOT / "src" / "luthier" / "methods").rglob("*.py"):
        assert "luthier.engine" not in path.read_text(encoding="utf-8"), path.name
