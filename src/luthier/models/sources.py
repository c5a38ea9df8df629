"""Models as weight operations see them: tensors read when asked for, and what must agree before they are combined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import UserError
from luthier.functional.averaging import first_mismatch
from luthier.models.info import fingerprint, read_json
from luthier.models.save import RECORD
from luthier.models.shards import Shards, torch_dtype

if TYPE_CHECKING:
    import torch

# The output embedding, which some files store beside an input embedding that it is tied to.
_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight", "cls.predictions.decoder.weight")
# What config.json says about the computation that no tensor's name or shape tells.
_SAME = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "num_experts_per_tok",
    "id2label",
    "tie_word_embeddings",
)


class ModelSource:
    """A model folder as a weight operation sees it.

    Args:
        folder: a folder in transformers' format.
        label: what errors call it; by default the folder.

    Raises:
        UserError: no safetensors there, or a quantised model, whose numbers are codes.
    """

    def __init__(self, folder: Path, label: str | None = None) -> None:
        self.folder, self.shards, self.label = folder, Shards(folder), label or str(folder)
        self.config: dict[str, Any] = read_json(p) if (p := folder / "config.json").is_file() else {}
        if self.config.get("quantization_config"):
            raise UserError("is quantised, and its weights are codes rather than numbers.", where=str(folder))
        names = self.shards.names()
        tied = self.config.get("tie_word_embeddings") is True
        doubled = {n for n in _HEADS if n in names and tied and any(re.search(r"embed|wte", m) for m in names)}
        # In the order of the files, so that the disk is read from front to back; a tied tensor counts once.
        held = self.shards.header
        self._names = sorted(set(names) - doubled, key=lambda n: (held[n].file.name, held[n].offset, n))

    def names(self) -> list[str]:
        """Names of its tensors; an output embedding that is the input embedding is not named."""
        return list(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: self.shards.header[name].shape for name in self._names}

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return torch_dtype(self.shards.header[name].dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        return self.shards.tensor(name)

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of a tensor, flat."""
        return self.shards.piece(name, start, stop)

    @cached_property
    def base_fingerprint(self) -> str | None:
        """Hash of the base it was fine-tuned from, where its run or its merge says so."""
        record = read_json(p) if (p := self.folder / RECORD).is_file() else {}
        manifest = read_json(p) if (p := self.folder.parent / "manifest.json").is_file() else {}
        found: str | None = record.get("base_fingerprint") or (manifest.get("model") or {}).get("fingerprint")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's own files."""
        return fingerprint(self.folder)

    def tokens(self) -> dict[str, int] | None:
        """Token -> id from tokenizer.json; None where there is none."""
        file = self.folder / "tokenizer.json"
        if not file.is_file():
            return None
        content = read_json(file)
        known = content.get("model", {}).get("vocab", {})
        # A unigram vocabulary is a list of (token, score) in the order of the ids.
        found = dict(known) if isinstance(known, dict) else {entry[0]: i for i, entry in enumerate(known)}
        return found | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def check_models(
    models: Mapping[str, ModelSource],
    base: ModelSource | None = None,
    *,
    against_base: bool = True,
    combines_base: bool = True,
    foreign: Sequence[str] = (),
    pads_rows: bool = False,
) -> None:
    """Refuse models that cannot be combined, before a tensor is read.

    Args:
        models: label -> the models.
        base: what they were fine-tuned from, if known.
        against_base: the base takes part: it must have the models' tensors.
        combines_base: its numbers are combined with the models': tied embeddings must then be tied in both.
        foreign: labels of models that may come from another base.
        pads_rows: rows may be missing and tokenizers differ: the operation checks these itself.

    Raises:
        UserError: names the tensor, or the file and key, that differs.
    """
    everything = {**({"base": base} if base else {}), **models}
    _same_computation(everything, combines_base)
    if not pads_rows:
        if problem := first_mismatch({label: source.shapes() for label, source in models.items()}):
            raise UserError(f"{problem}. Models must be fine-tuned from one base, with one head and tokenizer.")
        _same_tokens(everything)
    if base is not None and against_base:
        first = next(iter(models))
        _within(models[first], base, first, several=len(models) > 1, rows=not pads_rows)
    _one_base({label: m for label, m in models.items() if label not in foreign}, base)


def _same_computation(models: Mapping[str, ModelSource], combines_base: bool) -> None:
    (first, one), *others = models.items()
    for label, other in others:
        for key in _SAME:
            # A base may be a language model where the tuned model classifies: labels are compared between classifiers.
            if key == "id2label" and "base" in (first, label):
                continue
            if key == "tie_word_embeddings" and "base" in (first, label) and not combines_base:
                continue
            if key in one.config and key in other.config and one.config[key] != other.config[key]:
                raise UserError(
                    f"'{first}' has {key}: {one.config[key]!r} and '{label}' has {other.config[key]!r}; weights of "
                    "models that compute differently cannot be combined.",
                    where=str(other.folder / "config.json"),
                )


def first_other_token(one: Mapping[str, int], two: Mapping[str, int]) -> str | None:
    """The first token by id that the two tokenizers do not have in common; None where they are alike."""
    different = set(one.items()) ^ set(two.items())
    return min(different, key=lambda entry: (entry[1], entry[0]))[0] if different else None


def _same_tokens(models: Mapping[str, ModelSource]) -> None:
    known = {label: tokens for label, m in models.items() if (tokens := m.tokens()) is not None}
    if len(known) < 2:
        return
    (first, one), *others = known.items()
    for label, other in others:
        if (token := first_other_token(one, other)) is not None:
            raise UserError(
                f"its tokenizer is not that of '{first}': token {token!r} has id {one.get(token)} there and "
                f"{other.get(token)} in '{label}'. Rows of the embeddings would not belong together.",
                where=str(models[label].folder / "tokenizer.json"),
            )


def _within(model: ModelSource, base: ModelSource, label: str, *, several: bool, rows: bool) -> None:
    """The base must have what the models have; a single model may have a head of its own."""
    own, theirs = model.shapes(), base.shapes()
    for name, shape in own.items():
        if name not in theirs and several:
            raise UserError(f"tensor '{name}' is in '{label}' and not in the base, so it has no change to combine.")
        if rows and name in theirs and theirs[name] != shape:
            raise UserError(
                f"tensor '{name}' has shape {theirs[name]} in the base and {shape} in '{label}': they are not a base "
                "and its fine-tuned model."
            )
    if not own.keys() & theirs.keys():
        raise UserError(f"no tensor of '{label}' is in the base, such as '{next(iter(own), '')}'.")


def _one_base(models: Mapping[str, ModelSource], base: ModelSource | None) -> None:
    known = {label: m.base_fingerprint for label, m in models.items() if m.base_fingerprint}
    if base is not None and known:
        for label, recorded in known.items():
            if recorded != base.fingerprint:
                raise UserError(
                    f"'{label}' was fine-tuned from another state of its base: it records the fingerprint {recorded}, "
                    f"and {base.folder} has {base.fingerprint}.",
                    where=str(models[label].folder),
                )
    if len(set(known.values())) > 1:
        (first, value), *others = known.items()
        other = next(label for label, v in others if v != value)
        raise UserError(f"'{first}' and '{other}' were fine-tuned from different bases and cannot be combined.")
