"""Images as paths, bytes or objects: every one is opened once, before any model is loaded."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from luthier.data.columns import Columns
from luthier.data.layouts import IMAGE_TYPE
from luthier.data.problems import Problems

if TYPE_CHECKING:
    from PIL.Image import Image


def read(columns: Columns, column: str, problems: Problems) -> dict[str, Any]:
    """The ``image`` column (path, or bytes where there is no file) and ``image_hash`` over the bytes."""
    values, hashes = [], []
    for index, value in enumerate(columns.listed(column)):
        image, digest = _one(value, columns.folder, index, column, problems)
        values.append(image)
        hashes.append(digest)
    return {"image": pa.array(values, IMAGE_TYPE), "image_hash": pa.array(hashes, pa.string())}


def _one(value: Any, folder: Path | None, index: int, column: str, problems: Problems) -> tuple[Any, str | None]:
    path: Any = None
    data: bytes | None = None
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
    elif isinstance(value, str) and value.startswith("data:"):
        try:
            data = base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error:
            problems.add(index, column, "the image's base64 text is damaged", "", value)
            return None, None
    elif isinstance(value, str):
        path = value
    elif isinstance(value, bytes):
        data = value
    elif hasattr(value, "save"):  # a PIL image
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        data = buffer.getvalue()
    if path is None and data is None:
        problems.add(index, column, "there is no image", "Expected a path, or bytes.", repr(value))
        return None, None
    if data is None:
        file = Path(path).expanduser()
        file = file if file.is_absolute() or folder is None else folder / file
        if not file.is_file():
            problems.add(index, column, "the image file does not exist", "Paths start at the data file's folder.", path)
            return None, None
        data = file.read_bytes()
        image: dict[str, Any] = {"path": str(file.resolve()), "bytes": None}
    else:
        image = {"path": None, "bytes": data}
    problem = _verify(data)
    if problem:
        problems.add(index, column, problem, "Expected PNG, JPEG, WebP or the like.", path or f"{len(data)} bytes")
        return None, None
    return image, hashlib.blake2b(data, digest_size=16).hexdigest()


def _verify(data: bytes) -> str:
    """What is wrong with the bytes as an image; empty when nothing is."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except UnidentifiedImageError:
        return "the file is not an image"
    # Decoders raise many kinds of errors on damaged files; each of them means that the image cannot be used.
    except Exception as error:
        return f"the image is damaged ({error})"
    return ""


def open_image(image: dict[str, Any]) -> Image:
    """The RGB picture of a canonical ``image`` value."""
    from PIL import Image

    source = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    with Image.open(source) as opened:
        return opened.convert("RGB")
