"""Which layout a file has, told from its columns, and the one canonical schema that all layouts become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import pyarrow as pa

from luthier.core.errors import UserError, did_you_mean
from luthier.data.problems import ACCEPTED_LAYOUTS

IMAGE_TYPE = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("id", pa.string()),
        ("kind", pa.string()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        # Put between prompt and completion where no chat template does it; null joins them as they are.
        ("separator", pa.string()),
        ("completion", pa.string()),
        ("rejected", pa.string()),
        ("system", pa.string()),
        ("messages", pa.string()),
        ("rejected_messages", pa.string()),
        ("tools", pa.string()),
        ("label", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("tags", pa.list_(pa.string())),
        ("image", IMAGE_TYPE),
        ("extra", pa.string()),
        ("key", pa.string()),
    ]
)

# Synonyms seen in the wild, the most telling first: where a file has two, the earlier one is taken.
PROMPT = ("prompt", "question", "instruction", "query", "problem", "input", "inputs", "source", "user")
COMPLETION = (
    *("completion", "response", "answer", "output", "outputs", "solution", "target", "targets", "code", "assistant"),
    *("reply", "summary", "highlights", "canonical_solution", "ground_truth"),
)
# A text column is a prompt only beside a column that can be nothing but what is written for it.
WRITTEN_FOR_TEXT = ("completion", "response", "code", "summary", "highlights")
MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
CHOSEN = ("chosen", "chosen_response", "preferred")
REJECTED = ("rejected", "rejected_response", "dispreferred")
TEXT = ("text", "sentence", "content", "document", "article", "body", "passage", "review", "story", "tweet", "comment")
TEXT_PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2")),
    *(("question", "sentence"), ("text_a", "text_b")),
)
LABEL = ("label", "labels", "category", "class", "sentiment", "intent", "emotion", "coarse_label", "fine_label")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "labels", "upos", "pos_tags", "chunk_tags", "ner")
IMAGE = ("image", "img", "picture", "image_path", "file_name")
ID = ("id", "_id", "uid", "uuid", "idx", "example_id", "task_id")

NAMES = ("pair", "alpaca", "chat", "preference", "text", "classification", "regression", "tags", "image")
ALIASES = {
    "prompt-completion": "pair",
    "prompt/completion": "pair",
    "messages": "chat",
    "sharegpt": "chat",
    "conversations": "chat",
    "openai": "chat",
    "lines": "text",
    "paragraphs": "text",
    "conll": "tags",
}
STYLES = {"lines": "lines", "paragraphs": "paragraphs", "conll": "tags", "tags": "tags"}
TASK_LAYOUTS = {
    "causal-lm": ("preference", "chat", "alpaca", "pair", "text"),
    "sequence-classification": ("classification",),
    "sequence-regression": ("regression",),
    "token-classification": ("tags",),
    "image-classification": ("image",),
    "masked-lm": ("text", "classification"),  # of classification rows the text alone is read
}
ROLES = ("prompt", "completion", "text", "text2", "messages", "chosen", "rejected", "label", "tokens", "tags")
OPTIONAL_ROLES = ("input", "system", "tools", "id")
MAPPABLE = (*ROLES, "image", *OPTIONAL_ROLES)


@dataclass(frozen=True)
class Layout:
    """Which column plays which part.

    Attributes:
        name: one of :data:`NAMES`.
        fields: part -> column, for the parts that every row must have.
        optional: part -> column, for those it may have.
    """

    name: str
    fields: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for reports, such as ``pair (prompt=question, completion=answer)``."""
        parts = [p if p == c else f"{p}={c}" for p, c in {**self.fields, **self.optional}.items()]
        return f"{self.name} ({', '.join(parts)})"

    @property
    def columns(self) -> set[str]:
        """The columns that are read."""
        return {*self.fields.values(), *self.optional.values()}


def resolve_name(layout: str, task: str | None = None) -> str:
    """``auto`` or the proper name of a layout.

    Args:
        layout: a name or an alias.
        task: where it is known, the layout must be one for it.

    Raises:
        UserError: there is no such layout, or it is of another task.
    """
    name = ALIASES.get(layout, layout)
    if name != "auto" and name not in NAMES:
        accepted = ("auto", *NAMES, *ALIASES)
        hint = did_you_mean(layout, accepted)
        raise UserError(f"unknown layout '{layout}'.{hint} Accepted: {', '.join(accepted)}.", where="data.layout")
    if task is not None and name not in ("auto", *TASK_LAYOUTS[task]):
        accepted = ("auto", *TASK_LAYOUTS[task])
        raise UserError(
            f"the layout '{layout}' is not one for the task {task}. Accepted: {', '.join(accepted)}; or set "
            "`model.task`.",
            where="data.layout",
        )
    return name


class _Names:
    """The columns of a file under normalised names, the user's own mapping first."""

    def __init__(self, columns: Iterable[str], mapping: Mapping[str, str]) -> None:
        taken = set(mapping.values())
        # Written on purpose, so a file's own column of that name gives way.
        self.by_name = {c.strip().lower().replace(" ", "_"): c for c in reversed(list(columns)) if c not in taken}
        self.mapping = mapping

    def find(self, part: str, names: Iterable[str]) -> str | None:
        if part in self.mapping:
            return self.mapping[part]
        return next((self.by_name[n] for n in names if n in self.by_name), None)


def detect(
    columns: Iterable[str], task: str, layout: str = "auto", mapping: Mapping[str, str] | None = None
) -> Layout | None:
    """The layout that a set of columns means for a task; None when there is none.

    Args:
        columns: the names, as they are in the file.
        task: what the model is used for; it decides which layouts are looked for.
        layout: only this one, unless ``auto``.
        mapping: part -> column, where the user names columns.
    """
    names = _Names(columns, mapping or {})
    wanted = TASK_LAYOUTS[task] if layout == "auto" else (layout,)
    for name in wanted:
        # Beside a label, text alone is meant only where the user says so.
        by_chance = name == "text" and layout == "auto" and "text" not in names.mapping
        fields = None if by_chance and names.find("label", LABEL) else _FINDERS[name](names)
        if fields is not None and None not in fields.values():
            optional = {p: names.find(p, s) for p, s in _OPTIONAL.get(name, {}).items()}
            optional["id"] = names.find("id", ID)
            used = set(fields.values())
            return Layout(
                name,
                cast("dict[str, str]", fields),
                {p: c for p, c in optional.items() if c is not None and c not in used},
            )
    return None


def _pair(names: _Names) -> dict[str, str | None]:
    prompt, completion = names.find("prompt", PROMPT), names.find("completion", COMPLETION)
    if prompt is None:
        prompt, written = names.find("text", TEXT), names.find("completion", WRITTEN_FOR_TEXT)
        return {"prompt": prompt, "completion": written}
    return {"prompt": prompt, "completion": completion}


def _alpaca(names: _Names) -> dict[str, str | None]:
    prompt = names.find("prompt", ("instruction",))
    beside = names.find("input", ("input", "context"))
    completion = names.find("completion", ("output", "response", "completion"))
    # Without the input column it is alpaca only by its two other names, else an ordinary pair.
    if beside is None and (completion is None or completion.lower() != "output"):
        return {"prompt": None}
    return {"prompt": prompt, "completion": completion}


def _classification(names: _Names) -> dict[str, str | None]:
    label = names.find("label", LABEL)
    if "text" in names.mapping and "text2" in names.mapping:
        return {"text": names.mapping["text"], "text2": names.mapping["text2"], "label": label}
    for first, second in TEXT_PAIRS:
        if "text" not in names.mapping and first in names.by_name and second in names.by_name:
            return {"text": names.by_name[first], "text2": names.by_name[second], "label": label}
    return {"text": names.find("text", (*TEXT, *PROMPT)), "label": label}


_FINDERS = {
    "pair": _pair,
    "alpaca": _alpaca,
    "chat": lambda names: {"messages": names.find("messages", MESSAGES)},
    "preference": lambda names: {"chosen": names.find("chosen", CHOSEN), "rejected": names.find("rejected", REJECTED)},
    "text": lambda names: {"text": names.find("text", TEXT)},
    "classification": _classification,
    "regression": _classification,  # the same columns; the label is a number
    "tags": lambda names: {"tokens": names.find("tokens", TOKENS), "tags": names.find("tags", TAGS)},
    "image": lambda names: {"image": names.find("image", IMAGE), "label": names.find("label", LABEL)},
}
_SYSTEM = ("system", "system_prompt")
_OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "pair": {"system": _SYSTEM},
    "alpaca": {"input": ("input", "context"), "system": _SYSTEM},
    "chat": {"system": _SYSTEM, "tools": ("tools", "functions")},
    "preference": {"prompt": PROMPT, "system": _SYSTEM, "tools": ("tools", "functions")},
}


def no_layout(columns: Iterable[str], task: str, layout: str, mapping: Mapping[str, str], where: str) -> UserError:
    """The error for columns that mean nothing for the task."""
    columns = list(columns)
    other = next((t for t in TASK_LAYOUTS if t != task and detect(columns, t)), None)
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    wanted = f"layout '{layout}'" if layout != "auto" else f"any layout for the task {task}"
    found = detect(columns, other) if other and layout == "auto" else None
    hint = f" They are a {found.describe()} layout: set `model.task: {other}`" if found else ""
    if found:
        hint += ", or `data.layout: text` to train on the text alone." if found.name == "classification" else "."
    return UserError(
        f"the columns ({shown}) do not make {wanted}.{hint} Accepted layouts: {ACCEPTED_LAYOUTS}. Name the columns in "
        "`data.columns`, for example {prompt: my_question, completion: my_answer}.",
        where=where,
    )


def check_mapping(mapping: Mapping[str, str], columns: Iterable[str], where: str) -> None:
    """Every part and every column that the user names must exist.

    Raises:
        UserError: one does not.
    """
    columns = list(columns)
    for part, column in mapping.items():
        if part not in MAPPABLE:
            hint = did_you_mean(part, MAPPABLE)
            raise UserError(f"unknown part '{part}'.{hint} Accepted: {', '.join(MAPPABLE)}.", where="data.columns")
        if column not in columns:
            hint = did_you_mean(column, columns)
            found = ", ".join(map(str, columns[:12]))
            raise UserError(f"no column '{column}' (data.columns.{part}).{hint} Columns: {found}.", where=where)
