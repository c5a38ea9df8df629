"""What is compared: entries such as ``anchored-sft(anchor_weight=0.1)+half-ft[training.learning_rate=1e-4]``.

An entry is one or more methods joined by ``+``, each with options in round brackets where wanted, and behind all of
them changes to the recipe in square brackets. The common ground is the recipe's model, data with its stages, training,
evaluation, decoding and parameters; objective, transforms, selection, weights and procedure are plain SFT's unless the
entry names others. ``recipe`` is the recipe with its own methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.core import registry
from luthier.core.errors import UserError, did_you_mean

SFT, BASE, OWN = "sft", "base", "recipe"
# Where a name is looked for when several axes have it; `axis:name` says which one is meant.
ORDER = ("objective", "procedure", "parameters", "selection", "transform", "data", "weights", "decoding")
_PLACES = {"transform": "transforms", "data": "stages"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Part:
    """One method of an entry."""

    axis: str
    slug: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Attributes:
        name: as it was written, without spaces.
        parts: its methods; empty for the base, for plain SFT and for the recipe's own.
        overrides: ``key.path=value`` changes to the recipe.
    """

    name: str
    parts: tuple[Part, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def changes_rows(self) -> bool:
        """Whether it may train on other rows, or another number of tokens, than plain SFT does."""
        return any(part.axis in ("selection", "data", "procedure") for part in self.parts)

    def sections(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of this entry as a mapping, without its overrides.

        Args:
            common: the resolved recipe that all entries start from.
        """
        if self.name.partition("[")[0] == OWN:
            return {**common}
        made: dict[str, Any] = {
            **common,
            "data": {**common["data"], "stages": list(common["data"].get("stages") or [])},
            "procedure": SFT,
            "objective": [],
            "transforms": [],
            "selection": None,
            "weights": [],
            "analysis": [],
        }
        own_parameters: list[Any] = []
        for part in self.parts:
            spec = {part.slug: dict(part.options)} if part.options else part.slug
            place = _PLACES.get(part.axis, part.axis)
            if place == "stages":
                made["data"]["stages"].append(spec)
            elif place == "parameters":
                own_parameters.append(spec)
            elif isinstance(made[place], list):
                made[place].append(spec)
            else:
                made[place] = spec
        made["objective"] = made["objective"] or [SFT]
        made["parameters"] = own_parameters or common["parameters"]
        return made

    def description(self) -> str:
        """What it is, in words."""
        if self.name == BASE:
            return "the model before any training"
        if self.name == SFT:
            return "plain supervised fine-tuning"
        titles = [registry.get(p.axis, p.slug).title for p in self.parts]
        return " ".join(t for t in titles if t) or "the recipe's own methods"


def parse(texts: Sequence[str]) -> list[Entry]:
    """Entries from texts, each of which may hold several, separated by commas; ``base`` and ``sft`` come by themselves.

    Raises:
        UserError: an unknown method, brackets that do not close, an option without a value, or one entry twice.
    """
    entries: list[Entry] = []
    for text in texts:
        for piece in _split(text, ",", text):
            if not (written := piece.strip()):
                continue
            entry = _entry(written)
            if entry.name in (BASE, SFT):
                continue
            if any(entry.name == other.name for other in entries):
                raise UserError(f"--methods: '{entry.name}' is named twice. Leave one out, or give it other options.")
            entries.append(entry)
    return entries


def _entry(text: str) -> Entry:
    head, overrides = text, []
    if text.endswith("]"):
        at = _opening(text)
        head, inside = text[:at], text[at + 1 : -1]
        overrides = [piece.strip() for piece in _split(inside, ",", text)]
        for piece in overrides:
            if "=" not in piece:
                raise UserError(f"--methods: '{piece}' in '{text}' must be a change to the recipe, key.path=value.")
    name = head.strip() + (f"[{','.join(overrides)}]" if overrides else "")
    if head.strip() in (BASE, SFT, OWN):
        parts: tuple[Part, ...] = ()
    else:
        parts = tuple(_part(piece.strip(), text) for piece in _split(head, "+", text))
    return Entry(name.replace(" ", ""), parts, tuple(overrides))


def _part(text: str, whole: str) -> Part:
    name, _, rest = text.partition("(")
    name = name.strip()
    if rest and not rest.endswith(")"):
        raise UserError(f"--methods: '{text}' does not close its bracket: name(option=value, ...).")
    options = dict(_option(piece, whole) for piece in _split(rest[:-1], ",", whole) if piece.strip()) if rest else {}
    axis, colon, slug = name.partition(":")
    if colon and axis in registry.AXES:
        registry.get(axis, slug)
        return Part(axis, slug, options)
    if colon and axis.endswith(".py"):
        registry.get("objective", name)
        return Part("objective", name, options)
    known = [a for a in ORDER if name in registry.names(a)]
    if not known:
        every = sorted({n for a in ORDER for n in registry.names(a)})
        raise UserError(
            f"--methods: there is no method '{name}'.{did_you_mean(name, every)} See: luthier methods. A method that "
            "stands on several axes is named as axis:name."
        )
    return Part(known[0], name, options)


def _option(text: str, whole: str) -> tuple[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--methods: '{text.strip()}' in '{whole}' must be option=value.")
    try:
        return key.strip(), YAML(typ="safe", pure=True).load(value)
    except YAMLError as error:
        raise UserError(f"--methods: the value of '{key.strip()}' in '{whole}' is no YAML: {value.strip()}") from error


def _split(text: str, separator: str, whole: str) -> list[str]:
    """The text cut at separators outside all brackets."""
    pieces, depth, start = [], [], 0
    for index, letter in enumerate(text):
        if letter in _CLOSING:
            depth.append(_CLOSING[letter])
        elif letter in _CLOSING.values():
            if not depth or depth.pop() != letter:
                raise UserError(f"--methods: the brackets of '{whole}' do not match.")
        elif letter == separator and not depth:
            pieces.append(text[start:index])
            start = index + 1
    if depth:
        raise UserError(f"--methods: the brackets of '{whole}' do not match.")
    return [*pieces, text[start:]]


def _opening(text: str) -> int:
    """Where the square bracket that ends the text was opened."""
    depth = 0
    for index in range(len(text) - 1, -1, -1):
        depth += (text[index] == "]") - (text[index] == "[")
        if depth == 0:
            return index
    raise UserError(f"--methods: the brackets of '{text}' do not match.")
