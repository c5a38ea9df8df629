"""``luthier methods``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli import common
from luthier.core.errors import UserError, did_you_mean
from luthier.recipe.describe import accepted, literal, type_of

if TYPE_CHECKING:
    from luthier.core.registry import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see it in detail.", show_default=False)] = None,
    axis: Annotated[str | None, typer.Option("--axis", "-a", help="Only this axis, such as objective.")] = None,
    as_json: common.Json = False,
) -> None:
    """List the methods, or show one with its formula, options and conflicts."""
    from luthier.core import registry

    axes = [axis] if axis else list(registry.AXES)
    if name is None:
        found = [registry.get(a, slug) for a in axes for slug in registry.names(a)]
        common.emit([_brief(m) for m in found], as_json, lambda out: _list(out, found))
        return
    chosen = [registry.get(a, name) for a in axes if name in registry.names(a)]
    if not chosen:
        every = sorted({slug for a in axes for slug in registry.names(a)})
        raise UserError(f"there is no method '{name}'.{did_you_mean(name, every)} List them with: luthier methods")
    details = [_detail(m) for m in chosen]
    common.emit(details, as_json, lambda out: _show(out, chosen, details))


def _brief(method: Method) -> dict[str, Any]:
    return {"axis": method.axis, "name": method.slug, "title": method.title, "paper": method.paper}


def _detail(method: Method) -> dict[str, Any]:
    from luthier.recipe.plan import Choice

    needs = Choice(method, {}).needs if method.axis == "objective" and _free(method) else None
    return {
        **_brief(method),
        "description": (sys.modules[method.target.__module__].__doc__ or "").strip(),
        "options": _options(method),
        "schema": method.options.model_json_schema(),
        "conflicts": dict(method.conflicts),
        "requires": dict(method.requires),
        "tasks": list(method.tasks or (needs.tasks if needs else ())),
        "needs": vars(needs) if needs else {},
        "identity": None if method.identity is None else dict(method.identity),
    }


def _free(method: Method) -> bool:
    """Whether it can be built without options, which a method with ``needs`` as a property has to be."""
    return not any(field.is_required() for field in method.options.model_fields.values())


def _options(method: Method) -> list[dict[str, Any]]:
    """One entry per option, from the schema that the signature makes."""
    schema = method.options.model_json_schema()
    required = schema.get("required", [])
    entries = []
    for name, about in schema.get("properties", {}).items():
        entry = {"name": name, "type": type_of(about), "accepted": accepted(about), "required": name in required}
        entries.append({**entry, "default": about.get("default"), "description": about.get("description", "")})
    return entries


def _list(out: Any, found: list[Method]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("axis", "name", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    last = ""
    for method in found:
        table.add_row(f"[dim]{method.axis if method.axis != last else ''}[/dim]", method.slug, escape(method.title))
        last = method.axis
    out.print(table)
    out.print("\nOne in detail: luthier methods NAME", style="dim", soft_wrap=True)


def _show(out: Any, chosen: list[Method], details: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    for method, about in zip(chosen, details, strict=True):
        out.rule(f"[bold]{method.slug}[/bold]  [dim]{method.axis}[/dim]", align="left", style="dim")
        out.print(escape(about["description"]), soft_wrap=True)
        if about["options"]:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for column in ("option", "type", "default", "accepted", "meaning"):
                table.add_column(column, no_wrap=column in {"option", "default"})
            for option in about["options"]:
                default = "(required)" if option["required"] else literal(option["default"])
                cells = (option["name"], option["type"], default, option["accepted"], option["description"])
                table.add_row(*map(escape, cells))
            out.print()
            out.print(table)
        else:
            out.print("\nIt has no options.", style="dim")
        if about["tasks"]:
            out.print(f"\n[bold]tasks[/bold]  {', '.join(about['tasks'])}", soft_wrap=True)
        for fact, reason in about["conflicts"].items():
            out.print(f"\n[bold]not with[/bold] {escape(fact)}: {escape(reason)}", soft_wrap=True)
        for fact, reason in about["requires"].items():
            out.print(f"\n[bold]only with[/bold] {escape(fact)}: {escape(reason)}", soft_wrap=True)
        if about["identity"] is not None and about["options"]:
            text = ", ".join(f"{k}: {literal(v)}" for k, v in about["identity"].items()) or "its defaults"
            out.print(f"\n[bold]equals plain sft[/bold] at {{{escape(text)}}}", soft_wrap=True)
        if about["paper"]:
            out.print(f"\n[bold]paper[/bold]  {escape(about['paper'])}", soft_wrap=True)
