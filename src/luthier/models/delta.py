"""What fine-tuning changed, as an object of its own: differences by tensor name with the fingerprint of their base.

    tuned = base + delta                     base + language + task: deltas of one base add up, in any combination

A delta is refused on any other base, naming both fingerprints. It is kept as one safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luthier.core.errors import UserError
from luthier.core.store import atomic_folder
from luthier.functional.differences import Difference, add, add_to, difference, pack, unpack
from luthier.functional.tying import untie
from luthier.models.shards import read_header

FORMAT = "luthier-delta-1"
FILE = "delta.safetensors"


@dataclass(frozen=True)
class Delta:
    """A difference to a base model.

    Attributes:
        base: fingerprint of the base (:func:`luthier.models.info.fingerprint`).
        parts: tensor name -> its difference.
        absolute: tensors that the base does not share, such as a new head, with their full values.
        about: JSON about how it was made; ``untied`` says that its model had a tied output matrix given a copy of its
            own, which :meth:`apply` does as well.
    """

    base: str
    parts: Mapping[str, Difference] = field(default_factory=dict)
    absolute: Mapping[str, torch.Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def between(
        cls, tuned: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], fingerprint: str, **options: Any
    ) -> Delta:
        """The difference of two sets of tensors of the same names; ``tolerance`` is that of :func:`difference`."""
        found = {name: difference(tuned[name], base[name], **options) for name in tuned}
        return cls(fingerprint, {name: part for name, part in found.items() if part is not None})

    @property
    def entries(self) -> int:
        """Entries of the base that it changes."""
        return sum(int(part.amount().numel()) for part in self.parts.values())

    def check(self, tensors: Mapping[str, torch.Tensor], base: str, *, where: str | None = None) -> None:
        """Refuse tensors that it does not fit.

        Raises:
            UserError: another base, or a tensor that is missing or has another shape (the first one is named).
        """
        for name, shape in [(n, p.shape) for n, p in self.parts.items()] + [
            (n, t.shape) for n, t in self.absolute.items()
        ]:
            there = tensors.get(name)
            if there is None or tuple(there.shape) != tuple(shape):
                found = "is not there" if there is None else f"has shape {tuple(there.shape)}"
                raise UserError(
                    f"the delta changes '{name}' of shape {tuple(shape)}, which {found} in this model. It belongs to "
                    f"the base {self.base}, this is {base}.",
                    where=where,
                )
            if not there.is_floating_point():
                raise UserError(
                    f"'{name}' is quantised, and a delta cannot be added to quantised weights. Open the model in "
                    "float32 or bfloat16.",
                    where=where,
                )
        if base != self.base:
            raise UserError(
                f"the delta belongs to the base {self.base}, this is {base}. Apply it to the base it was made from.",
                where=where,
            )

    def apply(
        self,
        model: torch.nn.Module | Mapping[str, torch.Tensor],
        base: str,
        *,
        factor: float = 1.0,
        absolute: bool = True,
    ) -> Applied:
        """Add it to a model's weights in place, in float32.

        Args:
            model: a model, or tensors by name.
            base: fingerprint of the base of these weights.
            factor: multiplies the differences.
            absolute: also put in the tensors kept with their full values.

        Returns:
            What it takes to :meth:`Applied.revert` bit for bit.

        Raises:
            UserError: see :meth:`check`.
        """
        (self if absolute else self.without_absolute()).check(_tensors(model), base)
        if self.about.get("untied") and isinstance(model, torch.nn.Module):
            untie(model)
        tensors = _tensors(model)
        done = Applied(tensors)
        with torch.no_grad():
            for name, part in self.parts.items():
                done.before.append((name, part, add_to(tensors[name].data, part, factor)))
            for name, value in self.absolute.items() if absolute else ():
                done.replaced[name] = tensors[name].detach().clone()
                tensors[name].data.copy_(value)
        return done

    @contextmanager
    def applied(self, model: torch.nn.Module | Mapping[str, torch.Tensor], base: str, **options: Any) -> Iterator[None]:
        """Within the block the model has the delta; afterwards it is as it was, bit for bit."""
        done = self.apply(model, base, **options)
        try:
            yield
        finally:
            done.revert()

    def scaled(self, factor: float) -> Delta:
        """The differences multiplied; tensors with full values stay."""
        return replace(self, parts={name: part.scaled(factor) for name, part in self.parts.items()})

    def without_absolute(self) -> Delta:
        """The differences alone."""
        return replace(self, absolute={})

    def __add__(self, other: Delta) -> Delta:
        """The sum of two deltas of one base; entries that both change add up.

        Raises:
            UserError: different bases, different shapes, or full values of one tensor in both.
        """
        if self.base != other.base:
            raise UserError(f"deltas of different bases cannot be added: {self.base} and {other.base}.")
        if both := sorted(self.absolute.keys() & other.absolute.keys()):
            raise UserError(f"both deltas hold full values of '{both[0]}'; leave them out of one (without_absolute).")
        parts = dict(self.parts)
        for name, part in other.parts.items():
            try:
                parts[name] = add(parts[name], part) if name in parts else part
            except ValueError as error:
                raise UserError(f"the deltas do not fit each other: '{name}': {error}.") from error
        about = {"untied": bool(self.about.get("untied") or other.about.get("untied"))}
        return Delta(self.base, parts, {**self.absolute, **other.absolute}, about)

    def save(self, folder: str | Path) -> Path:
        """Write ``delta.safetensors`` into a new folder; returns the folder."""
        with atomic_folder(Path(folder)) as aside:
            self.write(aside / FILE)
        return Path(folder)

    def write(self, file: Path) -> None:
        """Write it as one safetensors file."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        kinds: dict[str, Any] = {}
        for name, part in sorted(self.parts.items()):
            kinds[name], own = pack(part)
            tensors |= {f"{name}::{key}": value.detach().cpu().contiguous() for key, value in own.items()}
        tensors |= {f"{n}::absolute": t.detach().cpu().contiguous() for n, t in sorted(self.absolute.items())}
        metadata = {
            "format": FORMAT,
            "base": self.base,
            "parts": json.dumps(kinds),
            "about": json.dumps(dict(self.about)),
        }
        save_file(tensors, file, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Read a delta from its file, or from the folder that holds it.

        Raises:
            UserError: there is none, or the file is something else.
        """
        from safetensors.torch import load_file

        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        _, metadata = read_header(file)
        if metadata.get("format") != FORMAT:
            raise UserError(f"is no delta (its format is {metadata.get('format')}).", where=str(file))
        own: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_file(file).items():
            name, _, which = key.rpartition("::")
            own.setdefault(name, {})[which] = value
        kinds = json.loads(metadata["parts"])
        return cls(
            metadata["base"],
            {name: unpack(about, own[name]) for name, about in kinds.items()},
            {name: tensors["absolute"] for name, tensors in own.items() if "absolute" in tensors},
            json.loads(metadata["about"]),
        )


@dataclass
class Applied:
    """A delta that was added to weights, and what they were before.

    Attributes:
        tensors: the weights.
        before: (name, difference, the entries it touched as they were), in order.
        replaced: tensors that were replaced, as they were.
    """

    tensors: Mapping[str, torch.Tensor]
    before: list[tuple[str, Difference, torch.Tensor]] = field(default_factory=list)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def revert(self) -> None:
        """Put every touched entry back, bit for bit."""
        for name, part, entries in reversed(self.before):
            part.write(self.tensors[name].data, entries)
        for name, value in self.replaced.items():
            self.tensors[name].data.copy_(value)
        self.before, self.replaced = [], {}


def _tensors(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if isinstance(model, torch.nn.Module):
        return dict(model.named_parameters(remove_duplicate=False))
    return model
