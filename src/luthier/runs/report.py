"""``report.html``: one self-contained page on what a run gained, what it lost, and how it went.

Everything that comes from data, models or recipes is text to the page: the template escapes it, and the page's own
content security policy forbids scripts and any fetch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError
from luthier.models.info import read_json
from luthier.runs import plots
from luthier.runs import verdict as judging
from luthier.runs.manifest import versions
from luthier.runs.pages import write_page

FILE = "report.html"
_MOST_SAMPLES = 20
_LONGEST_TEXT = 4000
_TITLES = {"target": "Target task", "keep": "General ability", "calibration": "Calibration"}
_CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "supervised_per_second": "Supervised tokens per second",
    "nll": "Negative log-likelihood",
    "mean_probability": "Mean probability of the target",
}
# Counts that should be zero: shown in the colour of a loss when they are not.
_WARNINGS = re.compile(
    r"truncat|reject|dropp|lost|doubled|duplicat|nothing|unsupervised|missing|skipp|error", re.IGNORECASE
)


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a run's folder from the files that are there.

    Args:
        folder: holds any of recipe.yaml, manifest.json, metrics.jsonl, evaluation.json, data.json, samples.json; a
            section whose file is absent is left out.

    Returns:
        The page.

    Raises:
        UserError: the folder holds none of these files, or one of them cannot be read.
    """
    folder = Path(folder)
    wanted = ("recipe.yaml", "manifest.json", "metrics.jsonl", "evaluation.json", "data.json", "samples.json")
    if not any((folder / name).is_file() for name in wanted):
        raise UserError(f"is not a run's folder: it has none of {', '.join(wanted)}.", where=str(folder))
    return write_page(folder / FILE, Path(__file__).with_name("report.html.j2"), content(folder))


def content(folder: Path) -> dict[str, Any]:
    """What the template shows, from a run's files."""
    manifest = _optional(folder / "manifest.json")
    evaluation = judging.with_paired_changes(_optional(folder / "evaluation.json"))
    recipe = p.read_text(encoding="utf-8") if (p := folder / "recipe.yaml").is_file() else ""
    records = read_metrics(folder / "metrics.jsonl")
    samples = json.loads(p.read_text(encoding="utf-8")) if (p := folder / "samples.json").is_file() else []
    compared = {group: judging.changes(evaluation, group) for group in judging.GROUPS}
    paired = any(c.paired for found in compared.values() for c in found)
    return {
        "title": folder.resolve().name,
        "about": _about(manifest),
        "verdict": judging.verdict(evaluation),
        "show": judging.text,
        "bare": judging.bare,
        "numbers": _numbers(manifest, evaluation.get("training") or {}, records),
        "comparisons": [
            {"title": _TITLES[group], "rows": [_row(c) for c in found]} for group, found in compared.items() if found
        ],
        "confidence": f"{100 * float(evaluation.get('confidence') or 0.95):g} %",
        "method": (
            "Where the same answers were judged twice, the change has a paired interval; elsewhere the two intervals "
            "are combined, which is cautious."
            if paired
            else "The interval of a change combines the two intervals, which is cautious when the items are the same."
        ),
        "charts": _charts(records),
        "samples": [_sample(s) for s in samples[:_MOST_SAMPLES]],
        "data": _sections(_optional(folder / "data.json"), "Rows", warn=True),
        "recipe": coloured(recipe),
        "provenance": _sections(_provenance(manifest), "Run"),
        "version": manifest.get("versions", {}).get("luthier") or versions()["luthier"],
    }


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        UserError: another line is no JSON object with a step.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] = float(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError("is no JSON object with a step.", where=f"{file}:{number}") from error
        records.append(record)
    return records


def _about(manifest: Mapping[str, Any]) -> str:
    model = manifest.get("model") or {}
    count = model.get("parameters")
    methods = [k.partition(":")[2] for k in manifest.get("methods") or {} if not k.startswith(("decoding:", "reward:"))]
    name = short_name(model["id"]) if model.get("id") else None
    parts = [
        f"{name} ({short_count(count)} parameters)" if name and count else name,
        str(model["task"]) if model.get("task") else None,
        " + ".join(dict.fromkeys(methods)),
        str(manifest.get("started", ""))[:10],
    ]
    return " · ".join(p for p in parts if p)


def short_name(model: str) -> str:
    """A hub id as it is; of a folder on some machine its last part."""
    return Path(model).name if model.startswith(("/", ".", "~")) or "\\" in model else model


def short_count(value: float) -> str:
    """``260K``, ``1.2M``, ``7B``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _numbers(
    manifest: Mapping[str, Any], training: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """The run in numbers: name and text, of those that are known."""
    result = {**training, **(manifest.get("result") or {})}
    train = [r for r in records if r.get("split", "train") == "train"]
    found: list[tuple[str, str]] = []
    if steps := result.get("steps") or (train[-1]["step"] if train else None):
        early = " (stopped early)" if result.get("stopped_early") else ""
        found.append((f"steps{early}", f"{int(steps):,}"))
    if train and train[-1].get("epoch"):
        found.append(("epochs", f"{train[-1]['epoch']:.3g}"))
    if tokens := result.get("tokens"):
        found.append(("tokens seen", short_count(tokens)))
    if seconds := result.get("seconds"):
        found.append(("training time", duration(seconds)))
        if tokens:
            found.append(("tokens per second", f"{tokens / seconds:,.0f}"))
    if peak := result.get("peak_memory_bytes"):
        found.append(("peak memory", f"{peak / 2**30:.3g} GiB"))
    trained, total = result.get("trainable_parameters"), (manifest.get("model") or {}).get("parameters")
    if trained and total:
        found.append(("of the weights trained", f"{100 * trained / total:.3g} %"))
    return found


def _row(change: judging.Change) -> dict[str, Any]:
    unit, before = change.unit, change.before or {}
    wishes = {"higher": "higher is better", "lower": "lower is better"}
    return {
        "change": change,
        "wish": wishes.get(str(change.after.get("direction"))) if change.status != "unknown" else None,
        "bars": _bars(change),
        "before": judging.text(before.get("value"), unit),
        "before_interval": judging.interval(before, unit),
        "after": judging.text(change.after.get("value"), unit),
        "after_interval": judging.interval(change.after, unit),
        "difference": judging.text(change.value, unit, signed=True),
        "difference_interval": judging.interval(change, unit, signed=True),
        "n": f"{int(n):,}" if (n := judging.number(change.after.get("n"))) is not None else "–",
    }


def _bars(change: judging.Change) -> list[dict[str, Any]]:
    """Widths and whiskers in per cent of the axis: 0 to 1 for shares that should be high, else 0 to the largest end."""
    both = [(role, m) for role, m in (("before", change.before), ("after", change.after)) if m is not None]
    ends = [v for _, m in both for k in ("value", "high") if (v := judging.number(m.get(k))) is not None]
    lows = [v for _, m in both for k in ("value", "low") if (v := judging.number(m.get(k))) is not None]
    if not ends or min(lows) < 0:
        return []
    full_axis = judging.is_share(change.unit) and change.after.get("direction") == "higher" and max(ends) <= 1
    top = 1.0 if full_axis else max(ends) or 1.0
    bars = []
    for role, metric in both:
        value, low, high = (judging.number(metric.get(k)) for k in ("value", "low", "high"))
        if value is not None:
            known = low is not None and high is not None
            bars.append(
                {
                    "role": role,
                    "width": round(100 * value / top, 2),
                    "low": round(100 * (low or 0.0) / top, 2) if known else None,
                    "span": round(100 * ((high or 0.0) - (low or 0.0)) / top, 2) if known else None,
                }
            )
    return bars


def _charts(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Loss, learning rate, the evaluations, then every other value that was logged."""
    from markupsafe import Markup

    train = [r for r in records if r.get("split", "train") == "train"]
    evaluations = [r for r in records if r.get("split") == "eval"]

    def curve(source: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
        return [(r["step"], v) for r in source if (v := judging.number(r.get(key))) is not None]

    def chart(title: str, *series: plots.Series, from_zero: bool = False) -> dict[str, Any]:
        drawn = [s for s in series if s.points]
        svg = plots.line_chart(drawn, title=title, from_zero=from_zero)
        # Made by plots.line_chart, which escapes every text it is given.
        return {"title": title, "series": drawn, "svg": Markup(svg)}

    def keys(source: Sequence[Mapping[str, Any]]) -> list[str]:
        found = dict.fromkeys(k for r in source for k, v in r.items() if judging.number(v) is not None)
        return [k for k in found if k not in ("step", "epoch", "rows", "tokens", "supervised")]

    charts = [
        chart(
            "Loss",
            plots.Series("training", curve(train, "loss")),
            plots.Series("evaluation", curve(evaluations, "loss"), "eval", dots=True),
        ),
        chart("Learning rate", plots.Series("learning rate", curve(train, "learning_rate")), from_zero=True),
    ]
    for key in keys(evaluations):
        if key != "loss":
            points = plots.Series("evaluation", curve(evaluations, key), "eval", dots=True)
            charts.append(chart(f"Evaluation: {_curve_name(key).lower()}", points))
    others = [k for k in keys(train) if k not in ("loss", "learning_rate")]
    charts += [chart(_curve_name(key), plots.Series(key, curve(train, key), "fourth")) for key in others]
    return [c for c in charts if c["svg"]]


def _curve_name(key: str) -> str:
    words = key.replace("_", " ")
    return _CURVES.get(key) or words[:1].upper() + words[1:]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    answers = []
    for key, name in (("reference", "Reference"), ("before", "Before"), ("after", "After")):
        if sample.get(key) is not None:
            answers.append((name, words(sample[key]), _score(sample.get(f"{key}_score"))))
    return {"prompt": words(sample.get("prompt", "")), "answers": answers}


def _score(score: Any) -> tuple[str, str] | None:
    value = float(score) if isinstance(score, bool) else judging.number(score)
    if value is None:
        return None
    if value in (0.0, 1.0):
        return ("right", "better") if value else ("wrong", "worse")
    return (f"{value:.2f}", "same")


def words(value: Any) -> str:
    """A value as text, JSON where it is none; a very long one is cut, and says so."""
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    return said if len(said) <= _LONGEST_TEXT else f"{said[:_LONGEST_TEXT]}… ({len(said):,} characters)"


def _sections(facts: Mapping[str, Any], first: str, *, warn: bool = False) -> list[dict[str, Any]]:
    """Nested facts as sections of (name, text, whether it is a warning); plain values come first under ``first``."""
    groups: dict[str, Any] = {first: {}}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            groups[_fact_name(key)] = value
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            groups |= {f"{_fact_name(key)}: {v.get('name', i)}": v for i, v in enumerate(value, 1)}
        else:
            groups[first][key] = value
    sections = []
    for title, group in groups.items():
        rows = []
        for name, value in _leaves(group):
            bad = warn and bool(_WARNINGS.search(name)) and (judging.number(value) or 0) > 0
            rows.append((name, _fact(value), bad))
        if rows:
            sections.append({"title": title, "facts": rows})
    return sections


def _leaves(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, value) of everything that says something; ``read`` and ``prepared`` are named only where names clash."""
    paths: list[tuple[tuple[str, ...], Any]] = []

    def walk(part: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in part.items():
            if isinstance(value, Mapping):
                walk(value, (*path, str(key)))
            elif value is not None and value not in ("", []) and (path or key != "name"):
                paths.append(((*path, str(key)), value))

    walk(group, ())
    short = [path[1:] if path[0] in ("read", "prepared") and len(path) > 1 else path for path, _ in paths]
    clear = [s if short.count(s) == 1 else path for s, (path, _) in zip(short, paths, strict=True)]
    return [(_fact_name(": ".join(path)), value) for path, (_, value) in zip(clear, paths, strict=True)]


def _fact_name(key: Any) -> str:
    words = str(key).replace("_", " ")
    return words[:1].upper() + words[1:]


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_fact(v) for v in value[:20]) + (f", … ({len(value)})" if len(value) > 20 else "")
    return words(value)


def _provenance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    if not manifest:
        return {}
    run = {k: manifest.get(k) for k in ("started", "finished", "seed", "recipe_hash") if manifest.get(k) is not None}
    seed = {"seed": str(run["seed"])} if "seed" in run else {}
    return {**run, **seed, **{k: manifest.get(k) or {} for k in ("model", "data", "hardware", "versions")}}


def coloured(recipe: str) -> Any:
    """The recipe's text with keys and comments marked."""
    from markupsafe import Markup

    lines = []
    for line in recipe.splitlines():
        found = re.match(r"(\s*(?:- )?)([\w.\-]+:)(.*)", line)
        if line.lstrip().startswith("#"):
            lines.append(f'<span class="c">{escape(line)}</span>')
        elif found:
            lines.append(f'{escape(found[1])}<span class="k">{escape(found[2])}</span>{escape(found[3])}')
        else:
            lines.append(escape(line))
    return Markup("\n".join(lines))
