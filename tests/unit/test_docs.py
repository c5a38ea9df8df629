"""The documentation is complete and current."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from luthier.core import registry

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


def test_the_list_of_methods_is_current():
    built = runpy.run_path(str(ROOT / "docs" / "build.py"))["listing"]()
    assert (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8") == built, "run `make docs`"


def test_the_engine_knows_no_method_by_name():
    slugs = {m.slug for m in registry.all_methods()} - {"full", "sft", "sample", "exact", "json", "text"}
    for path in (ROOT / "src" / "luthier" / "engine").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        named = [slug for slug in slugs if f'"{slug}"' in text or f"'{slug}'" in text]
        assert named == [], path.name


def test_methods_do_not_import_the_engine():
    for path in (ROOT / "src" / "luthier" / "methods").rglob("*.py"):
        assert "luthier.engine" not in path.read_text(encoding="utf-8"), path.name
