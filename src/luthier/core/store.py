"""The content-addressed store, and files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from luthier.core.errors import LuthierError


def content_hash(*parts: Any) -> str:
    """32 hexadecimal digits over JSON-able values, bytes and paths (a path stands for the file's bytes)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as handle:
                while block := handle.read(1 << 20):
                    digest.update(block)
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\x1e")
    return digest.hexdigest()[:32]


def cache_folder() -> Path:
    """The user's cache folder: ``$LUTHIER_CACHE``, else ``$XDG_CACHE_HOME/luthier``, else ``~/.cache/luthier``."""
    if chosen := os.environ.get("LUTHIER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier"


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or error
        raise LuthierError(
            f"could not write {path}: {cause}. Nothing that was there before is lost; "
            "free some space or choose another folder, then run again."
        ) from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file aside, sync it and rename it into place."""
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(data.encode() if isinstance(data, str) else data)
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; floats keep all their digits."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill; on success it is synced and takes the place of ``path``."""
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
        try:
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            os.chmod(aside, 0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-"))
                os.replace(path, old / "x")
                os.replace(aside, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(aside, path)
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


class Store:
    """Results by the hash of what they were computed from.

    Args:
        root: the folder; by default ``store`` in the user's cache folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root) if root else cache_folder() / "store"

    def folder(self, kind: str, key: str) -> Path:
        """Where the result of this kind and key lives (it may not exist yet)."""
        return self.root / kind / key

    def get_or_make(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The stored folder; ``make(folder)`` fills it once when it is absent."""
        target = self.folder(kind, key)
        if not target.exists():
            with atomic_folder(target) as aside:
                make(aside)
        return target
