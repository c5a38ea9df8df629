"""Import heavy modules only when they are used.

The options of a method are read from its signature, so checking a recipe imports the method's file, and that file
imports torch. Inside :func:`deferred` such an import binds a stand-in that becomes the real module at its first use;
a recipe is therefore checked without paying for torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "scipy", "sklearn")


class _Deferred(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        self.__dict__.update(real.__dict__)
        return getattr(real, name)


@contextmanager
def deferred(names: tuple[str, ...] = HEAVY) -> Iterator[None]:
    """Within the block, ``import torch`` (and the others of ``names``) costs nothing until an attribute is read."""
    stubs = {name: _Deferred(name) for name in names if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, stub in stubs.items():
            if sys.modules.get(name) is stub:
                del sys.modules[name]
