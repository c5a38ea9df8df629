"""Early exits of a decoder: the first n blocks with the model's own final norm and head are a model themselves.

:class:`Blocks` runs any range of a model's blocks through the model's own forward pass, so positions, masks, norms and
whatever follows the output embedding stay the architecture's. Blocks outside the range are stepped over and take
neither time nor key-value cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch

from luthier.core.errors import LuthierError, UserError

BLOCKS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
# Lists in a configuration with one entry per block.
PER_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types")
# Kinds of attention whose keys and values can be kept, copied and cut by position.
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


def transformers_model(model: Any) -> Any:
    """The transformers model itself, beneath adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def blocks_of(model: Any) -> torch.nn.ModuleList:
    """The decoder's blocks.

    Raises:
        UserError: an architecture whose first n blocks are no model of their own.
    """
    base = transformers_model(model)
    name, config = type(base).__name__, base.config.get_text_config()
    reasons = {
        "it has an encoder and a decoder": getattr(base.config, "is_encoder_decoder", False),
        "its blocks read inputs of their own": getattr(config, "hidden_size_per_layer_input", None),
        "its last blocks share keys and values": getattr(config, "num_kv_shared_layers", None),
        "its blocks share weights": getattr(config, "num_hidden_groups", None),
    }
    if reason := next((text for text, holds in reasons.items() if holds), None):
        raise UserError(f"{name} has no early exits: {reason}. Use a plain decoder-only model.")
    decoder = base.get_decoder()
    found = next((b for n in BLOCKS if isinstance(b := getattr(decoder, n, None), torch.nn.ModuleList)), None)
    if found is None:
        raise UserError(f"{name} has no list of blocks that is known, so it has no early exits.")
    final_norm(model)
    return found


def final_norm(model: Any) -> torch.nn.Module:
    """The norm between the last block and the output embedding.

    Raises:
        UserError: there is none, so hidden states of earlier blocks have another scale than the head expects.
    """
    base = transformers_model(model)
    decoder = base.get_decoder()
    found = next((m for n in FINAL_NORMS if isinstance(m := getattr(decoder, n, None), torch.nn.Module)), None)
    if found is None:
        raise UserError(f"{type(base).__name__} has no final norm that is known, so it has no early exits.")
    return found


def default_exits(depth: int) -> tuple[int, ...]:
    """Exits after 30, 40, ... 100% of the blocks."""
    return tuple(sorted({round(depth * tenths / 10) for tenths in range(3, 11)} - {0}))


def check_exits(exits: Sequence[int]) -> tuple[int, ...]:
    """The exits, which must increase from 1.

    Raises:
        UserError: they do not.
    """
    if not exits or exits[0] < 1 or any(b <= a for a, b in pairwise(exits)):
        raise UserError(
            f"exits: {list(exits)} must be block numbers that increase strictly, the first block being 1; for example "
            "[4, 6, 8] for a model of 8 blocks."
        )
    return tuple(exits)


def fit_exits(exits: Sequence[int], depth: int) -> tuple[int, ...]:
    """The exits, the last of which must be the whole model.

    Raises:
        UserError: it is not.
    """
    checked = check_exits(exits)
    if checked[-1] != depth:
        kept = [n for n in checked if n < depth]
        problem = "lies beyond the last block" if checked[-1] > depth else "is not the whole model"
        raise UserError(
            f"exits: the last exit, {checked[-1]}, {problem}: the model has {depth} blocks. Write {[*kept, depth]}."
        )
    return checked


def first_blocks(model: Any, exit: int) -> Any:
    """A standalone model of the first ``exit`` blocks; it shares the tensors of the given one.

    Raises:
        UserError: there is no such exit, or the model has an adapter.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            "a model with an adapter cannot be cut: merge it first (parameters: [{lora: {merge: true}}], or "
            "model.merge_and_unload())."
        )
    depth = len(blocks_of(model))
    if not 1 <= exit <= depth:
        raise UserError(f"there is no exit after block {exit}: the model has {depth} blocks. Choose 1 to {depth}.")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    part = copy.deepcopy(model, shared)
    # Assigning a sliced list keeps the blocks themselves, with their indices into the cache.
    decoder = part.get_decoder()
    place = next(n for n in BLOCKS if isinstance(getattr(decoder, n, None), torch.nn.ModuleList))
    setattr(decoder, place, getattr(decoder, place)[:exit])
    config = part.config.get_text_config()
    config.num_hidden_layers = exit
    for name in PER_BLOCK:
        if isinstance(values := getattr(config, name, None), list):
            setattr(config, name, values[:exit])
    trained = getattr(part.config, "sorted_exits", None)
    if trained:
        part.config.sorted_exits = [n for n in trained if n <= exit]
    return part


class _KeysStoredError(Exception):
    """Leaves a block once it has stored keys and values."""


@cache
def _cache_type() -> Any:
    from transformers import DynamicCache

    class BlockCache(DynamicCache):
        """A cache in which blocks may hold different numbers of positions."""

        past = 0  # positions held by the blocks that run now
        storing = False

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self.past

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return self.past

        def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
            return self.past + query_length, 0

        def update(self, *args: Any, **kwargs: Any) -> Any:
            found = super().update(*args, **kwargs)
            if self.storing:
                raise _KeysStoredError
            return found

        def held(self, block: int) -> int:
            """Positions a block holds."""
            keys = self.layers[block].keys if block < len(self.layers) else None
            return 0 if keys is None else int(keys.shape[-2])

        def cut(self, length: int) -> None:
            """Forget the positions from ``length`` on, in every block."""
            for layer in self.layers:
                if layer.keys is not None:
                    layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    return BlockCache


class Blocks:
    """A model opened for running ranges of its blocks; a context manager that leaves the model as it was.

    Attributes:
        depth: number of blocks.
        stop: blocks after this one (1 is the first) are stepped over in any use of the model meanwhile.

    Example::

        with Blocks(model) as blocks:
            cache = blocks.cache()
            logits, left = blocks.run(0, 4, ids_BT, cache=cache, logits=1)      # exit 4
            logits, left = blocks.run(4, 8, entering=left, cache=cache, logits=1)   # and on to exit 8
    """

    def __init__(self, model: Any) -> None:
        self.base = transformers_model(model)
        self._blocks = blocks_of(model)
        self.depth = len(self._blocks)
        self.start, self.stop = 0, self.depth
        self._entering: torch.Tensor | None = None
        self._left: torch.Tensor | None = None
        self._storing = self._tuples = False
        self._before: list[Any] = []

    def __enter__(self) -> Blocks:
        for index, block in enumerate(self._blocks):
            self._before.append(vars(block).get("forward"))
            block.forward = partial(self._forward, index, block.forward)
        return self

    def __exit__(self, *problem: object) -> None:
        for block, before in zip(self._blocks, self._before, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before
        self._before = []

    def _forward(self, index: int, forward: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kw: Any) -> Any:
        if not self.start <= index < self.stop:
            return (hidden,) if self._tuples else hidden
        if self._entering is not None and (self._storing or index == self.start):
            hidden = self._entering
        if self._storing:
            try:
                forward(hidden, *args, **kw)
            except _KeysStoredError:
                return (hidden,) if self._tuples else hidden
            raise LuthierError(f"{type(self.base).__name__} keeps no keys and values: use kv: recompute.")
        out = forward(hidden, *args, **kw)
        self._tuples = isinstance(out, tuple)
        if index == self.stop - 1:
            self._left = out[0] if self._tuples else out
        return out

    def cache(self) -> Any:
        """An empty key-value cache.

        Raises:
            UserError: some blocks keep a state that is not by position.
        """
        kinds = set(getattr(self.base.config.get_text_config(), "layer_types", None) or ())
        if other := sorted(kinds - set(ATTENTION)):
            raise UserError(
                f"{type(self.base).__name__} has blocks of the kind {other[0]}, whose state cannot be kept by "
                "position: only mode: static works with it."
            )
        # Made without the configuration: sliding layers must not drop what may have to be cut back.
        return _cache_type()()

    def run(
        self,
        start: int,
        stop: int,
        ids_BT: torch.Tensor | None = None,
        *,
        entering: torch.Tensor | None = None,
        cache: Any = None,
        logits: int = 0,
        **inputs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Run blocks ``start`` to ``stop``, counted from 0, ``stop`` not included.

        Args:
            start: first block of the range.
            stop: the one behind its last.
            ids_BT: token ids; needed where the range begins with the first block.
            entering: [B, T, H], what left block ``start`` (1 is the first) for these positions.
            cache: of :meth:`cache`; the positions follow those it holds in the range's blocks.
            logits: how many of the last positions get logits of the exit after the range; 0 for none.
            inputs: further inputs of the model, such as ``attention_mask``.

        Returns:
            Logits [B, logits, V] or None, and [B, T, H], what leaves the last block of the range (before the norm).
        """
        if ids_BT is None:
            assert entering is not None
            # The embedding is looked up and replaced; which token it is does not matter.
            ids_BT = torch.zeros(entering.shape[:2], dtype=torch.long, device=entering.device)
        whole = self.start, self.stop
        self.start, self.stop, self._entering = start, stop, entering
        if cache is not None:
            cache.past = cache.held(start)
        inputs |= {"input_ids": ids_BT, "past_key_values": cache, "use_cache": cache is not None}
        try:
            if logits:
                found = self.base(**inputs, logits_to_keep=logits).logits[:, -logits:]
            else:
                self.base.get_decoder()(**inputs)
                found = None
        finally:
            self.start, self.stop = whole
            self._entering = None
        left, self._left = self._left, None
        assert left is not None
        return found, left

    def store(self, start: int, stop: int, entering: torch.Tensor, cache: Any) -> None:
        """Give the blocks of a range keys and values made from ``entering`` [B, T, H], without running them."""
        self._storing = cache.storing = True
        self._left = entering
        try:
            self.run(start, stop, entering=entering, cache=cache)
        finally:
            self._storing = cache.storing = False
