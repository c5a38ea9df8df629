"""The default procedure: train once on the training rows.

Example::

    procedure: sft
"""

from __future__ import annotations

from typing import Any

from luthier.core.protocols import Artefact
from luthier.core.registry import procedure


@procedure("sft", identity={})
def sft(ctx: Any) -> Artefact:
    """Train once on the training rows with the recipe's objective, transforms, selection and parameters."""
    return ctx.train(ctx.data.train)
