"""The examples of the documentation run: Python as it stands, recipes are planned, rows are read, commands exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from ruamel.yaml import YAML
from transformers import LlamaConfig, LlamaForCausalLM

import luthier.lab
from luthier.cli.main import app
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.data.read import read
from luthier.evaluation import sandbox
from luthier.lab.tokenizer import tokenizer
from luthier.recipe.load import load
from luthier.recipe.plan import plan

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("recipe", "data", "cli", "python", "evaluation", "lab", "advise", "compare")
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ENDINGS = {"jsonl": ".jsonl", "json": ".json", "csv": ".csv", "text": ".txt"}
ROWS = {
    "rows.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "rows.csv": "patient_says,doctor_says\na,b\n",
    "programs.jsonl": '{"prompt": "a", "completion": "b", "tests": "assert True"}\n',
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    info: list[str]
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}.md:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2].split(), match[3]))
    return [block for block in found if block.language in languages]


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """In place of the base of the lab, whose pretraining takes half a minute, one that has learnt nothing."""
    folder = tmp_path_factory.mktemp("nano")
    words = tokenizer(256)
    torch.manual_seed(0)
    ids = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=256, **sizes, **ids)).save_pretrained(
        folder
    )
    words.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, nano):
    """A folder with the files that the pages speak of, and the stand-in for the base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(luthier.lab, "base", lambda name="nano", **_: nano)
    for name, text in ROWS.items():
        Path(name).write_text(text)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda b: b.name)
def test_recipes_can_be_planned(block):
    """A whole recipe as it is; a few keys with a model and rows beside them."""
    recipe = YAML(typ="safe", pure=True).load(block.text)
    if "luthier" in recipe:
        Path("recipe.yaml").write_text(block.text)
        plan(load("recipe.yaml"))
    else:
        plan(load({"model": "lab:nano", "data": "lab:facts", **recipe}))


@pytest.mark.parametrize("page", sorted({b.page for b in blocks("python")}))
def test_python_runs(page, monkeypatch):
    """The blocks of a page one after the other, in one namespace, as a reader would run them."""
    registry.all_methods()  # a file that is imported under the copy would be missing behind it
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))  # a page registers a method of its own
    names: dict[str, object] = {}
    for block in (b for b in blocks("python") if b.page == page):
        if "sandbox" in block.text:
            try:
                sandbox.check()
            except UserError:
                continue
        exec(compile(block.text, block.name, "exec"), names)


@pytest.mark.parametrize("block", [b for b in blocks(*ENDINGS) if b.info], ids=lambda b: b.name)
def test_rows_are_read_in_the_layout_that_the_page_says(block):
    task, layout = block.info
    file = Path(f"rows{ENDINGS[block.language]}")
    lines = block.text.splitlines(keepends=True)
    # Two ways of writing one layout stand in one block of messages; a file holds one of them.
    files = lines if layout == "chat" else [block.text]
    for text in files:
        file.write_text(text)
        rows = read(str(file), task=task, progress=False)
        assert rows.layout == layout
        assert len(rows) >= 1
    if layout == "alpaca":
        assert len(rows) == len(json.loads(block.text))


def test_commands_and_their_options_exist():
    group = typer.main.get_command(app)
    seen = set()
    for block in blocks("console"):
        for line in block.text.splitlines():
            if not line.startswith("$ luthier "):
                continue
            name, *rest = shlex.split(line)[2:]
            options = set(itertools.chain.from_iterable(p.opts for p in group.commands[name].params))
            assert [w for w in rest if w.startswith("-") and w not in options] == [], f"{block.name}: {line}"
            seen.add(name)
    assert seen >= {"init", "check", "show-data", "train", "evaluate", "generate", "methods", "migrate", "merge"}


def test_pages_are_whole_and_name_no_machine():
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        for word in ("/root", "/tmp", "/work", "/home", "{{", "@@"):
            assert word not in text, f"{page}: {word}"
        for target in re.findall(r"\]\(([\w/]+\.md)", text):
            assert (DOCS / target).is_file(), f"{page}: {target}"
    assert "luthier" in sys.modules
