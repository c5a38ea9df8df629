"""Luthier: fine-tune pretrained models with every method that claims to beat supervised fine-tuning."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["advise", "check", "compare", "evaluate", "generate", "list_methods", "merge", "tune"]


def __getattr__(name: str) -> Any:
    # The public functions load torch; the command line must not pay for it when it prints help.
    if name in {"check", "evaluate", "generate", "merge", "tune"}:
        from luthier.runs import api

        return getattr(api, name)
    if name == "advise":
        from luthier.advisor.advise import advise

        return advise
    if name == "compare":
        from luthier.comparison.run import compare

        return compare
    if name == "list_methods":  # `luthier.methods` is the package that holds them
        from luthier.core import registry

        return registry.all_methods
    raise AttributeError(f"module 'luthier' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
