"""One self-contained HTML page from a template: every text is escaped, and the common style is in the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.store import write_atomic


def write_page(page: Path, template: Path, content: Mapping[str, Any]) -> Path:
    """Render a Jinja2 template to a file, whole or not at all.

    Args:
        page: the file to write.
        template: the template; ``style`` in it is the CSS that all pages share.
        content: the template's variables; what is not ``Markup`` is escaped.

    Returns:
        The page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    style = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))
    rendered = environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **content)
    write_atomic(page, rendered)
    return page
