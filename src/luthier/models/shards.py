"""Safetensors checkpoints, one file or many, read and written tensor by tensor.

Headers are read without torch; a tensor, or a piece of one, is read from disk only when it is asked for, and the writer
keeps nothing in memory, so models larger than memory can be merged and edited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
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
# The format's names of types -> torch's.
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"}
_TORCH |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_TORCH |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
_TORCH |= {f"{sign}{bits}": f"{word}int{bits}" for sign, word in (("I", ""), ("U", "u")) for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor.

    Attributes:
        dtype: the format's name, such as ``F32`` or ``BF16``.
        shape: its shape.
        file: the file that holds it.
        offset: where its bytes begin in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

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
        tensors = {
            k: TensorInfo(v["dtype"], tuple(v["shape"]), file, 8 + length + v["data_offsets"][0])
            for k, v in header.items()
        }
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


def torch_dtype(name: str) -> torch.dtype:
    """The type of torch that the format calls so.

    Raises:
        UserError: torch has no such type of whole bytes.
    """
    import torch

    if name not in _TORCH:
        raise UserError(f"tensors of type {name} are packed and cannot be read as numbers.")
    kind: torch.dtype = getattr(torch, _TORCH[name])
    return kind


def _format_name(kind: torch.dtype) -> str:
    return next(name for name, known in _TORCH.items() if known == str(kind).removeprefix("torch."))


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
        self._raw: dict[Path, Any] = {}
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

    def piece(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries ``start`` to ``stop`` of a tensor in row order, flat; fewer where the tensor ends before.

        They are read into memory of their own: what was mapped from a file would count as the process's memory.
        """
        import torch

        info = self.header[name]
        kind = torch_dtype(info.dtype)
        stop = min(stop, info.numel)
        flat = torch.empty(max(stop - start, 0), dtype=kind)
        if flat.numel():
            if info.file not in self._raw:
                self._raw[info.file] = info.file.open("rb", buffering=0)
            handle = self._raw[info.file]
            handle.seek(info.offset + start * kind.itemsize)
            space = flat.view(torch.uint8).numpy().data
            while len(space):
                if not (read := handle.readinto(space)):
                    raise UserError("ends before its header says. Fetch the model again.", where=str(info.file))
                space = space[read:]
        return flat

    def close(self) -> None:
        """Close the files."""
        for handle in self._raw.values():
            handle.close()
        self._raw.clear()
        self._open.clear()

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
    """Writes tensors, piece by piece, into numbered safetensors files and their index; one shard is a plain file.

    What will be written is told beforehand, so that a file's header stands before its tensors and nothing is kept in
    memory. Use as a context manager, inside :func:`luthier.core.store.atomic_folder` when the folder must be whole or
    absent.

    Args:
        folder: an existing folder.
        layout: name -> (type, shape) of every tensor.
        max_bytes: size above which a new shard begins.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        max_bytes: int = 5_000_000_000,
    ) -> None:
        self.folder, self.layout = Path(folder), layout
        # Wide types first, as the format's own writer has it: each tensor then begins at a multiple of its width.
        self.names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
        self.shards: list[list[str]] = [[]]
        size = 0
        for name in self.names:
            more = self._bytes(name)
            if self.shards[-1] and size + more > max_bytes:
                self.shards.append([])
                size = 0
            self.shards[-1].append(name)
            size += more
        self._at = self._written = 0
        self._shard = -1
        self._handle: Any = None
        self._current: set[str] = set()

    def _bytes(self, name: str) -> int:
        kind, shape = self.layout[name]
        return math.prod(shape) * kind.itemsize

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next piece of a tensor, or all of it; tensors come in the order of ``names``, each whole before the next.

        Raises:
            ValueError: another tensor's turn, another type, or more than the tensor holds.
        """
        import torch

        if self._at == len(self.names) or name != self.names[self._at]:
            raise ValueError(f"it is not the turn of tensor '{name}'")
        if tensor.dtype != self.layout[name][0]:
            raise ValueError(f"tensor '{name}' is {tensor.dtype}, announced as {self.layout[name][0]}")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._written += flat.numel()
        if self._written > self._bytes(name):
            raise ValueError(f"tensor '{name}' is longer than announced")
        space = flat.numpy().data
        self._open_for(name)
        while len(space):
            space = space[self._handle.write(space) :]
        if self._written == self._bytes(name):
            self._at, self._written = self._at + 1, 0

    def _open_for(self, name: str) -> None:
        if self._handle is not None and name in self._current:
            return
        if self._handle is not None:
            self._handle.close()
        self._shard += 1
        self._current = set(self.shards[self._shard])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for each in self.shards[self._shard]:
            kind, shape = self.layout[each]
            start, end = end, end + self._bytes(each)
            header[each] = {"dtype": _format_name(kind), "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._handle = (self.folder / self._file(self._shard)).open("wb", buffering=0)
        self._handle.write(len(text).to_bytes(8, "little") + text)

    def _file(self, number: int) -> str:
        count = len(self.shards)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def close(self) -> None:
        """Close the last file and write the index.

        Raises:
            ValueError: a tensor is missing or incomplete.
        """
        self._release()
        if self._at < len(self.names):
            raise ValueError(f"tensor '{self.names[self._at]}' is not complete")
        if len(self.shards) > 1:
            mapping = {name: self._file(number) for number, names in enumerate(self.shards) for name in names}
            total = sum(map(self._bytes, self.names))
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapping.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._release()
