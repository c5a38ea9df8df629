"""A writer from how a recipe names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.core.errors import UserError, did_you_mean
from luthier.generation.base import Writer

BACKENDS = ("endpoint", "scripted", "vllm")


def open_writer(spec: Mapping[str, Any], *, fingerprint: str = "") -> Writer:
    """The writer of ``{endpoint: {url, model, ...}}``, ``{vllm: {model, ...}}`` or ``{scripted: {file}}``.

    Args:
        spec: one key, the back-end, and its options.
        fingerprint: a hash of the weights, for an engine in this process.

    Raises:
        UserError: no such back-end, a wrong option, or a package that is not installed.
    """
    if len(spec) != 1:
        raise UserError(
            f"name one generation back-end with its options, such as {{endpoint: {{url: ...}}}}, not {spec}."
        )
    name, options = next(iter(spec.items()))
    if name not in BACKENDS:
        raise UserError(
            f"there is no generation back-end '{name}'.{did_you_mean(name, BACKENDS)} Accepted: {', '.join(BACKENDS)}."
        )
    try:
        if name == "endpoint":
            from luthier.generation.endpoint import Endpoint

            return Endpoint(**options)
        if name == "scripted":
            from luthier.generation.scripted import Scripted

            return Scripted.read(options["file"])
        from luthier.generation.engine_vllm import VLLM

        return VLLM(**options, fingerprint=fingerprint)
    except (TypeError, KeyError) as error:
        raise UserError(f"generation back-end {name}: {error}.") from error
