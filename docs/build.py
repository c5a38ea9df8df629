"""Write the pages that the code itself tells, so that they cannot go stale: ``make docs``.

``methods/README.md`` comes from the registry. ``recipe.md`` and ``lab.md`` are the files of the same name in
``templates/``, where ``{{keys Section}}`` stands for the keys of a section of the recipe schema, and
``{{options task}}`` for the options of a lab task. What an experiment of ``tests/behaviour/`` left in ``measured/``
stands between two marks in the page of its method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from luthier import lab
from luthier.core import registry
from luthier.recipe import schema
from luthier.recipe.describe import accepted, literal, type_of

DOCS = Path(__file__).resolve().parent
TEMPLATED = ("recipe.md", "lab.md")
# What the schema checks with code of its own, which JSON schema has no words for.
SOURCE = "a source, or a list of sources"
METHOD = "a method"
METHODS = "a method, or a list of methods"
KINDS = {
    ("Recipe", "model"): "a name, or the [section](#model)",
    ("Recipe", "data"): "a source, or the [section](#data)",
    ("Recipe", "procedure"): METHOD,
    ("Recipe", "objective"): "a method, or a list of weighted methods",
    ("Recipe", "transforms"): METHODS,
    ("Recipe", "selection"): f"{METHOD}, or null",
    ("Recipe", "parameters"): METHODS,
    ("Recipe", "weights"): METHODS,
    ("Recipe", "decoding"): METHOD,
    ("Recipe", "generation"): "{endpoint: {url, model}}, {vllm: {}}, {scripted: {file}}, or null",
    ("Recipe", "analysis"): METHODS,
    ("Recipe", "training"): "the [section](#training)",
    ("Recipe", "evaluation"): "the [section](#evaluation)",
    ("Data", "train"): SOURCE,
    ("Data", "test"): f"{SOURCE}, or null",
    ("Data", "select"): f"{SOURCE}, or null",
    ("Data", "keep"): f"default, {SOURCE}, or none",
    ("Data", "verifier"): f"{METHOD} of the axis reward, or null",
    ("Data", "stages"): METHODS,
    ("Data", "columns"): "a mapping of text to text",
    ("Training", "early_stopping"): "null, or the [section](#early-stopping)",
    ("Training", "warmup"): "float: a share of the steps below 1, or a whole number of steps",
}


def listing() -> str:
    """The list of methods: one table per axis, each method with what it does and its source."""
    lines = ["# Methods", "", "Made by `make docs` from the registry.", ""]
    for axis in registry.AXES:
        methods = [registry.get(axis, slug) for slug in registry.names(axis)]
        if not methods:
            continue
        lines += [f"## {axis}", "", "| method | what it does | source |", "|---|---|---|"]
        for method in methods:
            page = DOCS / "methods" / f"{method.slug}.md"
            name = f"[{method.slug}]({page.name})" if page.exists() else method.slug
            lines.append(f"| {name} | {method.title} | {method.paper} |")
        lines.append("")
    return "\n".join([*lines, *costs(), ""])


def costs() -> list[str]:
    """What ``bench/objectives.py`` measured, as ratios to plain SFT."""
    found = json.loads((DOCS / "measured" / "objectives.json").read_text(encoding="utf-8"))
    about = found["about"]
    lines = [
        "## What they cost",
        "",
        "Time of all rows and peak memory as ratios to plain SFT on the same rows in the same run: 11M parameters, "
        f"vocabulary 32,000, fp32, {about['threads']} threads, batch {about['batch']}; medians over {about['rounds']} "
        "rounds with their range (`make bench`).",
        "",
        "| method | time | range | aim | memory | |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found["entries"]:
        if entry["name"] == "sft":
            continue
        ratio, aim = entry["ratio"], entry["aim"]
        late = aim is not None and ratio["median"] > aim
        notes = ["misses its aim"] if late else []
        notes += ["a reference is resident"] if entry["reference"] else []
        time = f"{ratio['median']:.2f} | {ratio['low']:.2f} - {ratio['high']:.2f} | {aim or ''}"
        lines.append(f"| {entry['name']} | {time} | {entry['memory_ratio']:.2f} | {'; '.join(notes)} |")
    return lines


def keys(name: str) -> str:
    """The keys of a section of the recipe as a table: what each accepts, its default, its meaning."""
    section: type[BaseModel] = getattr(schema, name)
    properties = section.model_json_schema()["properties"]
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        kind = KINDS.get((name, key)) or " — ".join(filter(None, _kind(properties[key])))
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        lines.append(f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(field.description or '')} |")
    return "\n".join(lines)


def _kind(about: dict[str, Any]) -> tuple[str, str]:
    kind = type_of(about)
    if kind == "any":
        raise KeyError(f"say in docs/build.py what {about.get('title')} accepts")
    words = accepted(about)
    return ("", words.replace(", ", " \\| ")) if kind == "choice" else (kind, words)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its defaults"
    if value == "":
        return ""
    if isinstance(value, dict | list):
        return f"`{value}`".replace("'", "")
    return f"`{literal(value)}`"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("<", "&lt;")


def options(name: str) -> str:
    """The options of a lab task as a table."""
    about = lab.tasks()[name].options.model_json_schema()["properties"]
    lines = ["| option | accepts | default |", "|---|---|---|"]
    for key, entry in about.items():
        words = ", ".join(filter(None, [type_of(entry), accepted(entry)])).removeprefix("choice, ")
        lines.append(f"| `{key}` | {_cell(words)} | `{literal(entry.get('default'))}` |")
    return "\n".join(lines)


def templated(name: str) -> str:
    """A page whose tables are made from code."""
    makers = {"keys": keys, "options": options}
    text = (DOCS / "templates" / name).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+) (\w+)\}\}", lambda found: makers[found[1]](found[2]), text)


def measured(found: dict[str, Any]) -> str:
    """An experiment's design, the means over its seeds, and what became of each claim."""
    lines = ["> " + line if line else ">" for line in found["design"].strip().splitlines()]
    lines += ["", f"Means over {len(found['seeds'])} seeds; every number is in `docs/measured/{found['method']}.json`."]
    means = found["mean"]
    nested = any(isinstance(v, dict) for arms in means.values() for v in arms.values())
    for title, arms in means.items() if nested else [("", means)]:
        metrics = list(dict.fromkeys(name for values in arms.values() for name in values))
        lines += ["", f"| {title} | " + " | ".join(n.replace("_", " ") for n in metrics) + " |"]
        lines.append("|---|" + "---|" * len(metrics))
        for arm, values in arms.items():
            lines.append(f"| {_cell(arm)} | " + " | ".join(_number(values.get(n)) for n in metrics) + " |")
    lines += ["", "| claim | |", "|---|---|"]
    for claim, value in found["claims"].items():
        on_seeds = isinstance(value, int) and not isinstance(value, bool)
        said = f"{value} of {len(found['seeds'])}" if on_seeds else "holds" if value else "**does not hold**"
        lines.append(f"| {_cell(claim)} | {said} |")
    return "\n".join(lines)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, int | float) and abs(value) < 1000 else str(value)


def with_measurements(page: Path) -> str:
    """A method's page with its experiment between the two marks."""
    text = page.read_text(encoding="utf-8")
    found = json.loads((DOCS / "measured" / f"{page.stem}.json").read_text(encoding="utf-8"))
    before, begin, rest = text.partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- /measured -->")
    if not begin or not end:
        raise KeyError(f"{page}: there is no place between <!-- measured --> and <!-- /measured -->")
    return f"{before}{begin}\n{measured(found)}\n\n{end}{after}"


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that is made, with its text."""
    yield DOCS / "methods" / "README.md", listing()
    for name in TEMPLATED:
        yield DOCS / name, templated(name)
    for page in sorted((DOCS / "methods").glob("*.md")):
        if (DOCS / "measured" / f"{page.stem}.json").exists():
            yield page, with_measurements(page)


if __name__ == "__main__":
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
