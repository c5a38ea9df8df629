"""Write ``docs/methods/README.md``, the list of all methods, from the registry: ``make docs``."""

from __future__ import annotations

from pathlib import Path

from luthier.core import registry

FOLDER = Path(__file__).resolve().parent / "methods"


def listing() -> str:
    """The page: one table per axis, each method with what it does and its source."""
    lines = ["# Methods", "", "Made by `make docs` from the registry.", ""]
    for axis in registry.AXES:
        methods = [registry.get(axis, slug) for slug in registry.names(axis)]
        if not methods:
            continue
        lines += [f"## {axis}", "", "| method | what it does | source |", "|---|---|---|"]
        for method in methods:
            page = FOLDER / f"{method.slug}.md"
            name = f"[{method.slug}]({page.name})" if page.exists() else method.slug
            lines.append(f"| {name} | {method.title} | {method.paper} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(listing(), encoding="utf-8")
