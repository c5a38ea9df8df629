"""Writing completions in bulk, by whatever can write: a model here, an engine, a server, or a script."""

from luthier.generation.base import Kept, Settings, Writer, kept
from luthier.generation.open import open_writer

__all__ = ["Kept", "Settings", "Writer", "kept", "open_writer"]
