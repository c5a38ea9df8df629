"""Guess a recipe from a model and a data file, and write it with a comment on every choice.

Only the first block of rows, the model's configuration and its tokenizer file are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.recipe.load import load
from luthier.recipe.plan import plan
from luthier.recipe.schema import TASKS, Data, Evaluation, Recipe, Training
from luthier.recipe.source import parse

if TYPE_CHECKING:
    from luthier.data.layouts import Layout
    from luthier.models.info import ModelInfo

SAMPLE = 500
# Blocks read after the first to count the rows, or to estimate how many there are.
BLOCKS = 3
COMMENT_COLUMN = 40


@dataclass(frozen=True)
class Guess:
    """A written recipe.

    Attributes:
        text: the recipe, valid as it stands.
        remarks: what was guessed from what, one sentence each.
    """

    text: str
    remarks: list[str]


@dataclass(frozen=True)
class Rows:
    """What the first rows of a source tell.

    Attributes:
        rows: the first rows, as they are in the source.
        columns: every column seen in them.
        count: how many rows there are, or an estimate by size; None when unknown.
        exact: whether ``count`` is exact.
    """

    rows: list[dict[str, Any]]
    columns: list[str]
    count: int | None
    exact: bool


def guess(
    model: str,
    data: str,
    *,
    test: str | None = None,
    objective: str = "sft",
    parameters: str = "full",
    name: str | None = None,
) -> Guess:
    """A commented recipe.

    Args:
        model: a model folder, a hub id, or ``lab:<name>``.
        data: training rows.
        test: held-out rows; by default a file beside the data whose name says so.
        objective: the objective to write.
        parameters: what is trained.
        name: the recipe's name, for its output folder; by default that of the data and the methods.

    Raises:
        UserError: the model or the data cannot be read, or the rows have no layout that Luthier knows.
    """
    rows = look(data)
    info, remarks = _model(model)
    task, layout = _layout(rows, info, data)
    remarks.append(f"{data}: {_counted(rows)}, layout {layout.describe()}, task {task}")
    if test is None and (test := beside(data)) is not None:
        remarks.append(f"test rows: {test}")
    elif test is None:
        remarks.append("no test rows found beside the data; give some with --test, or set data.test")
    longest = _lengths(rows, layout, info)
    values = _values(rows, info, layout, task, longest, objective, parameters)
    # Loading it first makes a wrong method name an error, and gives the run its name.
    named = load({"model": model, "data": data, "objective": objective, "parameters": parameters})
    plan(named)
    output = f"runs/{name}" if name else named.output
    text = _write(values | {"model": model, "train": data, "test": test, "output": output, "task": task, "info": info})
    load(parse(text, "the recipe")[0])
    return Guess(text, remarks + values["remarks"])


def look(data: str) -> Rows:
    """The first rows of a source.

    Raises:
        UserError: there is no such source, or it holds no readable row.
    """
    from luthier.data.sources import open_source

    source = open_source(data)
    blocks = iter(source.batches())
    first = next(blocks, None)
    if first is None:
        raise UserError("holds no row.", where=data)
    total = len(first.rows)
    if not total:
        reject = first.rejects[0] if first.rejects else None
        raise reject.error() if reject else UserError("holds no row.", where=data)
    batch = first.rows[:SAMPLE] if isinstance(first.rows, list) else first.rows.slice(0, SAMPLE).to_pylist()
    columns = list({column: None for row in batch for column in row})
    read_on = [(len(block.rows), block.position) for block in islice(blocks, BLOCKS)]
    if len(read_on) < BLOCKS:
        return Rows(batch, columns, total + sum(n for n, _ in read_on), True)
    # Reading is a block ahead of what it gives, so only differences of positions tell bytes per row.
    span = read_on[-1][1] - first.position
    count = round(sum(n for n, _ in read_on) * source.size / span) if source.size and span > 0 else None
    return Rows(batch, columns, count, False)


def beside(data: str) -> str | None:
    """The held-out rows that belong to training rows, by the names of files."""
    from luthier.data.sources import SPLITS

    if data.startswith("lab:"):
        return data
    path = Path(data).expanduser()
    held_out = [*SPLITS["test"], *SPLITS["validation"]]
    if path.is_dir():
        words = {w for p in path.iterdir() for w in re.split(r"[._-]", p.name.lower())}
        return data if words & set(SPLITS["test"]) and words & set(SPLITS["train"]) else None
    if not path.is_file():
        return None
    for train in SPLITS["train"]:
        for word in held_out:
            other = path.with_name(
                re.sub(rf"(?<![a-z]){train}(?![a-z])", word, path.name, count=1, flags=re.IGNORECASE)
            )
            if other != path and other.is_file():
                return str(Path(data).with_name(other.name))
    return None


def _model(model: str) -> tuple[ModelInfo | None, list[str]]:
    if model.startswith("lab:"):
        return None, []
    from luthier.models.info import inspect

    if Path(model).expanduser().exists() or model.startswith((".", "/", "~")):
        return inspect(model), []
    try:
        return inspect(model), []
    except UserError as error:
        return None, [f"the model was not looked at ({error}); its task and size are guessed"]


def _layout(rows: Rows, info: ModelInfo | None, data: str) -> tuple[str, Layout]:
    from luthier.data.layouts import detect, no_layout

    first = info.task if info and info.task else "causal-lm"
    for task in (first, *(t for t in TASKS if t != first)):
        layout = detect(rows.columns, task)
        if layout is not None:
            return task, layout
    raise no_layout(rows.columns, first, "auto", {}, data)


def _counted(rows: Rows) -> str:
    if rows.count is None:
        return "many rows"
    return f"{rows.count:,} row{'s' if rows.count != 1 else ''}" if rows.exact else f"about {rows.count:,} rows"


def _text_of(row: dict[str, Any], layout: Layout) -> str:
    values = [row.get(column) for part, column in layout.fields.items() if part not in ("label", "tags")]
    if "tokens" in layout.fields:
        return " ".join(map(str, row.get(layout.fields["tokens"]) or ()))
    return "\n".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values)


def _lengths(rows: Rows, layout: Layout, info: ModelInfo | None) -> int | None:
    """Tokens of the longest row of the sample, where the model's tokenizer is a file that can be read at once."""
    file = info.folder / "tokenizer.json" if info else None
    if file is None or not file.is_file() or layout.name == "image":
        return None
    from tokenizers import Tokenizer

    texts = [_text_of(row, layout) for row in rows.rows]
    encodings = Tokenizer.from_file(str(file)).encode_batch(texts)
    return max(len(e.ids) for e in encodings)


_NUMBER = r"[-+]?[$€£]?\d[\d,]*(\.\d+)?%?"


def _verifier(rows: Rows, layout: Layout, task: str) -> str | None:
    """How answers can be judged, from what they look like."""
    column = layout.fields.get("completion")
    if task != "causal-lm" or column is None or "verifier" in rows.columns:  # such rows name their own
        return None
    answers = [str(row[column]).strip() for row in islice(rows.rows, SAMPLE) if row.get(column)]

    def most(pattern: str) -> bool:
        return bool(answers) and sum(bool(re.search(pattern, a, re.DOTALL)) for a in answers) >= 0.9 * len(answers)

    if most(rf"####\s*{_NUMBER}\s*$") or most(rf"\\boxed{{{_NUMBER}}}") or most(rf"^{_NUMBER}$"):
        wanted = "numeric"
    elif most(r"^[\[{].*[\]}]$"):
        wanted = "json"
    elif answers and max(map(len, answers)) <= 60:
        wanted = "normalised"
    else:
        return None
    return wanted if wanted in registry.names("reward") else None


def _learning_rate(info: ModelInfo | None, model_is_lab: bool, parameters: str) -> float:
    if parameters not in ("full", "half-ft"):
        return 2e-4
    size = info.parameters if info else 0 if model_is_lab else 10**9
    return 5e-4 if size < 20_000_000 else 5e-5 if size < 500_000_000 else 2e-5


def _values(
    rows: Rows, info: ModelInfo | None, layout: Layout, task: str, longest: int | None, objective: str, parameters: str
) -> dict[str, Any]:
    remarks = []
    limit = info.max_length if info else None
    too_long = bool(longest and limit and longest > limit)
    if too_long:
        remarks.append(
            f"the longest of the first rows has {longest:,} tokens, the model takes {limit:,}: such rows are dropped "
            "and counted (data.truncation: drop); `luthier check` says how many"
        )
    verifier = _verifier(rows, layout, task)
    if verifier:
        remarks.append(f"answers look as if '{verifier}' could judge them: data.verifier")
    few = rows.count is not None and rows.count < 5_000
    return {
        "remarks": remarks,
        "layout": layout.describe(),
        "verifier": verifier,
        "too_long": too_long,
        "limit": limit,
        "count": _counted(rows),
        "epochs": 3 if few else 1,
        "learning_rate": _learning_rate(info, info is None, parameters),
        "objective": objective,
        "parameters": parameters,
    }


@dataclass
class _Lines:
    lines: list[str] = field(default_factory=list)

    def add(self, text: str = "", comment: str | None = "") -> None:
        self.lines.append(f"{text:<{COMMENT_COLUMN - 1}} # {comment}" if comment else text)

    def rest(self, schema: type[BaseModel], written: set[str]) -> None:
        """The keys that are left at their defaults, commented out, so that the file shows all there is."""
        for key, info in schema.model_fields.items():
            if key not in written:
                default = info.get_default(call_default_factory=True)
                shown = json.dumps(default) if default is None or isinstance(default, bool | list | dict) else default
                self.add(f"  # {key}: {shown}", _meaning(schema, key))


def _meaning(schema: type[BaseModel], key: str) -> str:
    """What a key is, and the words it accepts where these are few."""
    info = schema.model_fields[key]
    words = [_literal(word) for word in _choices(info.annotation)]
    return f"{info.description}: {', '.join(words)}" if len(words) > 1 else info.description or ""


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return [value for argument in get_args(annotation) for value in _choices(argument) or [argument]]
    return []


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _plain(text: str) -> str:
    """A YAML scalar; quoted where plain text would mean something else."""
    safe = re.fullmatch(r"[\w./~][\w./:?=&~+-]*", text) and not re.fullmatch(r"[\d.eE+-]+|true|false|null|~", text)
    return text if safe and not text.endswith(":") else json.dumps(text, ensure_ascii=False)


def _write(v: dict[str, Any]) -> str:
    out = _Lines()
    meaning = {key: info.description or "" for key, info in Recipe.model_fields.items()}
    out.add(
        "# Check this recipe with `luthier check`, look at its rows with `luthier show-data`, then `luthier train` it."
    )
    out.add("# A key behind a # is at its default. Methods to try: `luthier methods`.")
    out.add("luthier: 1", meaning["luthier"])
    info, task = v["info"], v["task"]
    size = f"{info.parameters:,} parameters, {info.architecture}" if info else meaning["model"]
    if (info.task if info else "causal-lm") == task:
        out.add(f"model: {_plain(v['model'])}", size)
    else:
        out.add("model:")
        out.add(f"  id: {_plain(v['model'])}", size)
        out.add(f"  task: {task}", "the rows are of this task; the model gets a new head")
    out.add()
    out.add("data:")
    written = {"train"}
    out.add(f"  train: {_plain(v['train'])}", f"{v['count']}; guessed layout: {v['layout']}")
    for key, value, comment in (
        ("test", v["test"] and _plain(v["test"]), "held-out rows of the target task"),
        ("keep", "default", Data.model_fields["keep"].description),
        ("verifier", v["verifier"], "guessed from the answers; " + str(Data.model_fields["verifier"].description)),
        ("truncation", "drop" if v["too_long"] else None, f"rows beyond the model's {v['limit']} tokens"),
    ):
        if value:
            out.add(f"  {key}: {value}", comment)
            written.add(key)
    out.rest(Data, written)
    out.add()
    out.add(f"objective: {v['objective']}", meaning["objective"])
    out.add(f"parameters: [{v['parameters']}]", meaning["parameters"])
    for key in ("procedure", "transforms", "selection", "weights", "decoding", "generation", "analysis"):
        default = Recipe.model_fields[key].get_default(call_default_factory=True)
        out.add(f"# {key}: {json.dumps(default) if not isinstance(default, str) else default}", meaning[key])
    out.add()
    out.add("training:")
    out.add(f"  epochs: {v['epochs']}", str(Training.model_fields["epochs"].description))
    out.add(f"  learning_rate: {v['learning_rate']:g}", "a starting point for this size and these parameters")
    out.add("  batch_rows: 16", str(Training.model_fields["batch_rows"].description))
    out.rest(Training, {"epochs", "learning_rate", "batch_rows"})
    out.add()
    out.add("evaluation:")
    out.rest(Evaluation, set())
    out.add()
    out.add(f"output: {_plain(v['output'])}", meaning["output"])
    out.add("seed: 0", meaning["seed"])
    return "\n".join(line.rstrip() for line in out.lines) + "\n"
