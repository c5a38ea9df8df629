"""Safetensors checkpoints, one file or many, read and written tensor by tensor.

Headers are read without torch; a tensor is read from disk only when it is asked for, and the writer keeps at most one
shard in memory, so models larger than memory can be merged and edited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import UserError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The format's limit on the size of a header; a larger number means the file is something else.
_HEADER_LIMIT = 100_000_000
_BITS = dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
_BITS |= dict.fromkeys(("F32", "I32", "U32"), 32) | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        dtype: the format's name, such as ``F32`` or ``BF16``.
        shape: its shape.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (self.numel * _BITS[self.dtype] + 7) // 8


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file and its metadata, without reading any tensor.

    Raises:
        UserError: the file is missing, cut short, or not safetensors.
    """
    if not file.is_file():
        raise UserError("no such file.", where=str(file))
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise UserError(
                f"is not a whole safetensors file ({size} bytes). Fetch or save the model again.", where=str(file)
            )
        text = handle.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {k: TensorInfo(v["dtype"], tuple(v["shape"]), file) for k, v in header.items()}
        end = max((v["data_offsets"][1] for v in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "has no readable safetensors header. Fetch or save the model again.", where=str(file)
        ) from error
    if 8 + length + end > size:
        raise UserError(
            f"is cut short: {size} bytes of {8 + length + end}. Fetch or save the model again.", where=str(file)
        )
    return tensors, metadata


class Shards:
    """The tensors of a folder (``model.safetensors``, its sharded form, or an adapter's file) or of one file.

    Args:
        path: a model or adapter folder, or a ``.safetensors`` file.

    Raises:
        UserError: there are no safetensors, or the index names a file or tensor that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        for file in self._files():
            tensors, metadata = read_header(file)
            self.header.update(tensors)
            self.metadata.update(metadata)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        index = self.path / INDEX
        if index.is_file():
            mapping: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({self.path / name for name in mapping.values()})
            for file in files:
                if not file.is_file():
                    raise UserError(
                        f"the index names {file.name}, which is not there; fetch the model again.", where=str(index)
                    )
            return files
        for name in (SINGLE, "adapter_model.safetensors"):
            if (self.path / name).is_file():
                return [self.path / name]
        pickled = sorted(p.name for p in self.path.glob("*.bin") if "model" in p.name)
        if pickled:
            raise UserError(
                f"has only {pickled[0]}, a pickle, which is never opened because it can run code. Convert it once to "
                "safetensors: load it in transformers where you trust it and call save_pretrained.",
                where=str(self.path),
            )
        raise UserError(f"has no {SINGLE} and no {INDEX}.", where=str(self.path))

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.header)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in its stored type, on the CPU.

        Raises:
            UserError: there is no tensor of that name.
        """
        from safetensors import safe_open

        from luthier.core.errors import did_you_mean

        if name not in self.header:
            raise UserError(f"has no tensor '{name}'.{did_you_mean(name, self.header)}", where=str(self.path))
        file = self.header[name].file
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt")
        tensor: torch.Tensor = self._open[file].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) in the order of the names, one in memory at a time."""
        for name in self.names():
            yield name, self.tensor(name)

    @property
    def numel(self) -> int:
        """Number of elements of all tensors."""
        return sum(info.numel for info in self.header.values())

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.nbytes for info in self.header.values())


class ShardWriter:
    """Writes tensors into numbered safetensors files and their index; a single shard becomes ``model.safetensors``.

    Use as a context manager, inside :func:`luthier.core.store.atomic_folder` when the folder must be whole or absent.

    Args:
        folder: an existing folder.
        max_bytes: size above which a shard is closed.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 5_000_000_000) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; each name once."""
        if name in self._seen:
            raise ValueError(f"tensor '{name}' was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._seen.add(name)
        # A view of a larger storage would be refused by the format (and would be written whole).
        self._pending[name] = tensor.detach().cpu().contiguous().clone()
        self._pending_bytes += size
        self._total += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"

    def close(self) -> None:
        """Write what is queued, give the files their final names, and write the index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self.folder / SINGLE)
            return
        mapping: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            mapping.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(mapping.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
