"""What the commands share: arguments, the plan of a recipe, and output for people or for programs.

Results go to stdout, progress and remarks to stderr; with ``--json`` stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe.plan import Plan

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, or the folder of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as training.epochs=2.", metavar="[KEY.PATH=VALUE]..."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


_SAID_ELSEWHERE = ("perplexity", "nll", "judged", "finished", "tokens", "ece_equal_width", "mean_probability")


def say(kind: str, text: str) -> None:
    """One line on stderr, whatever line breaks the text holds; the kind in colour on a terminal."""
    line = " ".join(str(text).split("\n")).strip()
    colour = {"error": 31, "interrupted": 33, "warning": 33}.get(kind, 36)
    label = f"\033[1;{colour}m{kind}:\033[0m" if sys.stderr.isatty() else f"{kind}:"
    print(f"{label} {line}", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """A remark for people on stderr, without a label."""
    print(text, file=sys.stderr, flush=True)


def console() -> Console:
    """The console of stdout."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # not a failure: see main

    # A pipe has no width; a wide one keeps each row of a table on its line.
    return Pipe(highlight=False, width=None if sys.stdout.isatty() else 160)


def jsonable(value: Any) -> Any:
    """JSON values: paths as text, sets sorted, arrays as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(jsonable(v) for v in value)
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "to_dict"):
        return jsonable(value.to_dict())
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return str(value)


def emit(value: Any, as_json: bool, human: Callable[[Console], None]) -> None:
    """Print a result: as JSON, or by ``human`` on the console of stdout."""
    if as_json:
        print(json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False), flush=True)
    else:
        human(console())


def recipe_file(path: Path) -> Path:
    """The recipe itself, or the resolved recipe a run's folder keeps."""
    inside = path / "recipe.yaml"
    return inside if path.is_dir() and inside.is_file() else path


def make_plan(path: Path, overrides: Sequence[str] | None) -> Plan:
    """Load a recipe with overrides and plan it."""
    from luthier.recipe.load import load
    from luthier.recipe.plan import plan

    return plan(load(recipe_file(path), overrides or ()))


def number(value: Any, digits: int = 4) -> str:
    """A number for people: significant digits, thousands separated; other values as they are."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.{digits}g}"
    return str(value)


def first_process() -> bool:
    """Whether this process speaks for all those of a distributed run."""
    return os.environ.get("RANK", "0") == "0"


def is_metric(value: Any) -> bool:
    """Whether it is ``{value, n, low, high, ...}``."""
    return isinstance(value, Mapping) and "value" in value


Stages = Mapping[str, Mapping[str, Any]]


def show_metrics(out: Console, stages: Stages) -> None:
    """A table of metrics with a column per stage: value and confidence interval.

    Args:
        out: where to print.
        stages: column title -> ``{group: {metric: {value, n, low, high, unit, direction}}}``; the rest is passed over.
    """

    def cells(found: list[Any]) -> list[str]:
        known = next(metric for metric in found if metric)
        shown = [f"{number(m['value'])} [dim]{_interval(m)}[/dim]" if m else "-" for m in found]
        return [*shown, number(known.get("n")), *([str(known.get("unit") or "")] if units else [])]

    units = out.width >= 110
    _metric_table(out, stages, cells, [*stages, "n", *(["unit"] if units else [])])


def show_side_by_side(out: Console, runs: Stages) -> None:
    """As :func:`show_metrics`, with a column per run, half the interval behind each value, and the best in bold.

    Metrics that only say another one again are left out: they stand in each run's report.
    """

    def cells(found: list[Any]) -> list[str]:
        values = [m["value"] if m else None for m in found]
        known = [v for v in values if isinstance(v, int | float)]
        direction = next((m["direction"] for m in found if m and m.get("direction")), "")
        best = {"higher": max, "lower": min}[direction](known) if known and direction else None
        shown = [number(v) + _half(m) for v, m in zip(values, found, strict=True)]
        return [
            f"[bold]{text}[/bold]" if v == best and v is not None else text
            for v, text in zip(values, shown, strict=True)
        ]

    brief = {
        run: {group: {k: v for k, v in metrics.items() if k not in _SAID_ELSEWHERE} for group, metrics in part.items()}
        for run, part in runs.items()
    }
    _metric_table(out, brief, cells, list(runs), note="behind ± half the confidence interval")


def _half(metric: Mapping[str, Any] | None) -> str:
    if not metric or metric.get("low") is None or metric.get("high") is None:
        return ""
    return f" ±{number((metric['high'] - metric['low']) / 2, 2)}"


def _metric_table(
    out: Console,
    stages: Stages,
    cells: Callable[[list[Any]], list[str]],
    columns: list[str],
    *,
    note: str = "in brackets the confidence interval",
) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(escape(column), justify="left" if column == "unit" else "right")
    last = ""
    for group, name in _metric_names(stages.values()):
        found = [(part.get(group) or {}).get(name) for part in stages.values()]
        direction = next((m.get("direction") for m in found if m), "")
        arrow = {"higher": " ↑", "lower": " ↓"}.get(direction or "", "")
        if group != last:
            table.add_row(f"[bold]{escape(group)}[/bold]")
        table.add_row(f"  {escape(name.replace('_', ' '))}{arrow}", *cells(found))
        last = group
    out.print(table)
    out.print(f"↓ less is better, ↑ more is better; {note}", style="dim", soft_wrap=True)


def _interval(metric: Mapping[str, Any]) -> str:
    if metric.get("low") is None or metric.get("high") is None:
        return ""
    # The bracket is escaped, or it would be read as markup.
    return f"\\[{number(metric['low'], 3)}, {number(metric['high'], 3)}]"


def _metric_names(parts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    names: dict[tuple[str, str], None] = {}
    for part in parts:
        for group, metrics in part.items():
            if isinstance(metrics, Mapping):
                names.update({(group, name): None for name, metric in metrics.items() if is_metric(metric)})
    return list(names)


def show_tree(out: Console, value: Mapping[str, Any], indent: int = 0) -> None:
    """Nested values as indented ``key  value`` lines, for reports whose shape is their author's."""
    from rich.markup import escape

    width = max((len(str(k)) for k in value), default=0)
    for key, item in value.items():
        label = f"{'  ' * indent}[bold]{escape(str(key).replace('_', ' '))}[/bold]"
        if isinstance(item, Mapping) and item:
            out.print(label, soft_wrap=True)
            show_tree(out, item, indent + 1)
        elif isinstance(item, list) and any(isinstance(i, Mapping) for i in item):
            out.print(label, soft_wrap=True)
            for entry in item:
                if isinstance(entry, Mapping):
                    show_tree(out, entry, indent + 1)
                else:
                    out.print(f"{'  ' * (indent + 1)}{escape(number(entry))}", soft_wrap=True)
        else:
            text = ", ".join(number(i) for i in item) if isinstance(item, list | tuple) else number(item)
            out.print(f"{label}{' ' * (width - len(str(key)) + 2)}{escape(text or '-')}", soft_wrap=True)
