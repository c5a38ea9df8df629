"""``luthier check``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luthier.cli import common
from luthier.cli.common import number

# What a prepared source counts -> how it is said.
FINDINGS = {
    "dropped": "longer than the model or data.max_length takes, dropped",
    "truncated": "cut at the maximal length",
    "nothing_to_learn": "without a supervised token, left out",
    "unsupervised_stop": "ending without a stop token of the tokenizer, so stopping is not learnt "
    "(data.template: plain ends answers with one)",
    "doubled_bos": "beginning with two BOS tokens",
}


REPEATED = {
    "duplicated_ids": ("id stands in more than one row", "ids stand in more than one row"),
    "duplicated_rows": ("row repeats an earlier one", "rows repeat earlier ones"),
}


def check(recipe: common.RecipeArgument, overrides: common.Overrides = None, as_json: common.Json = False) -> None:
    """Check everything that can fail, without training: recipe, every row, lengths, conflicts, memory and time."""
    plan = common.make_plan(recipe, overrides)
    from luthier.runs import api

    result = api.check(plan)
    common.emit(result, as_json, lambda out: _human(out, result))


def sources(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The reports of the training rows, the test rows and each keep source."""
    for part in (data.get("train"), data.get("test"), *(data.get("keep") or ())):
        if part:
            yield part


def findings(source: dict[str, Any]) -> list[str]:
    """One sentence per thing in a source that a user should know before training."""
    read, prepared = source.get("read") or {}, source.get("prepared") or {}
    rows = prepared.get("rows") or 0
    sentences = [
        f"{number(count)} row{'s' if count > 1 else ''} left out: {reason}"
        for reason, count in (read.get("rejected") or {}).items()
    ]
    if read.get("reject_file"):
        sentences[-1:] = [f"{text}; listed in {read['reject_file']}" for text in sentences[-1:]]
    for key, words in FINDINGS.items():
        if count := prepared.get(key):
            examples = ", ".join((prepared.get("examples") or {}).get(key, ())[:3])
            share = f" ({count / rows:.1%})" if rows else ""
            lost = prepared.get("supervised_lost") if key == "truncated" else 0
            cost = f", which loses {number(lost)} supervised tokens" if lost else ""
            found = f"{number(count)} row{'s' if count > 1 else ''}{share} {words}"
            sentences.append(f"{found}{cost}{f': {examples}' if examples else ''}")
    for key, (one, more) in REPEATED.items():
        if count := read.get(key):
            sentences.append(f"{number(count)} {more if count > 1 else one}")
    return [f"{source['name']}: {sentence}" for sentence in sentences]


def _human(out: Any, result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    methods = result["methods"]
    shown = {
        "objective": methods["objective"],
        "parameters": methods["parameters"],
        "procedure": [methods["procedure"]],
    }
    for axis in ("transforms", "stages", "weights", "analysis"):
        if methods.get(axis):
            shown[axis] = methods[axis]
    for axis in ("selection", "verifier", "decoding"):
        if methods.get(axis):
            shown[axis] = [methods[axis]]
    model = result["model"]
    lines = {axis: " + ".join(c["name"] for c in choices) for axis, choices in shown.items()}
    lines |= {"task": result["task"], "model": model["id"], "parameters in all": number(model["parameters"])}
    lines |= {"maximal length": f"{number(model['max_length'])} tokens", "steps": number(result["steps"])}
    common.show_tree(out, lines)

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("source")
    for column in ("rows", "used", "tokens", "supervised", "p50", "p99", "longest"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("layout")
    for source in sources(result["data"]):
        prepared = source["prepared"]
        lengths = prepared["lengths"]
        counts = (prepared["rows"], prepared["kept"], prepared["tokens"], prepared["supervised_tokens"])
        cells = [*counts, *(lengths.get(k) for k in ("p50", "p99", "max"))]
        table.add_row(escape(source["name"]), *map(number, cells), escape(source["layout"]))
    out.print()
    out.print(table)
    out.print()
    for sentence in [*result.get("notes", ()), *(s for part in sources(result["data"]) for s in findings(part))]:
        out.print(f"note: {sentence}", markup=False, soft_wrap=True)

    estimate = result["estimate"]
    memory = {k: v for k, v in estimate["memory"].items() if k not in ("total", "total_gib")}
    parts = ", ".join(f"{name} {_size(count)}" for name, count in memory.items())
    out.print(f"memory  about {_size(estimate['memory']['total'])}: {parts}", markup=False, soft_wrap=True)
    out.print(f"time    about {_duration(estimate['seconds'])} of training", markup=False, soft_wrap=True)
    for remark in estimate.get("notes", ()):
        out.print(f"        {remark}", markup=False, style="dim", soft_wrap=True)
    out.print("\nNothing stands in the way of training.", markup=False)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
