"""Masked language models: one supervised position per hidden token.

The mask token stands in place of 15% of a row's tokens, and the model is to say what stood there. Only the backbone
runs over all tokens; what follows it is given the hidden tokens alone, and the output embedding is left to the
log-prob head.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context
from luthier.core.rng import stream
from luthier.functional.replaced_tokens import draw_masked, put
from luthier.tasks.base import Encoded, carried, pad
from luthier.tasks.causal_lm import underlying

SHARE = 0.15


class MaskedLM:
    """Predicting hidden tokens of plain text with an encoder."""

    name = "masked-lm"
    reads: tuple[str, ...] = ("input_ids",)

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.pad_id = getattr(processor, "pad_token_id", None) or 0
        self.mask_id = getattr(processor, "mask_token_id", None)
        if self.mask_id is None:
            raise UserError("the tokenizer has no mask token, so it belongs to no model of the task masked-lm.")
        self.special = torch.tensor(sorted(processor.all_special_ids), dtype=torch.long)
        self._ends: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def collate(self, rows: Mapping[str, Sequence[Any]], index_B: Any, columns: Sequence[str] = ()) -> Batch:
        """Rows of ``input_ids``; which tokens are hidden is a function of the row's content."""
        ids_BT, mask_BT = pad(rows["input_ids"], self.pad_id)
        index_B = torch.as_tensor(np.asarray(index_B), dtype=torch.long)
        none_N = torch.empty(0, dtype=torch.long)
        whole = Batch(
            inputs={"input_ids": ids_BT, "attention_mask": mask_BT.long()},
            position_N=none_N,
            target_N=none_N,
            weight_N=torch.empty(0),
            sequence_N=none_N,
            row_B=index_B,
            columns=carried(rows, columns),
            adjustable_BT=mask_BT & ~torch.isin(ids_BT, self.special),
        )
        content = [zlib.crc32(np.ascontiguousarray(ids).tobytes()) for ids in rows["input_ids"]]
        made = self._hide(whole, [stream(0, "masked-lm", number) for number in content])
        made.keys_B = list(rows["key"]) if "key" in rows else None
        return made

    def vary(self, batch: Batch, ctx: Context) -> Batch:
        """The same rows with other tokens hidden, drawn anew for each row and epoch."""
        ids_BT = put(batch.inputs["input_ids"], batch.position_N, batch.target_N)
        generators = [ctx.rng("noise", "masked-lm", ctx.epoch, row) for row in batch.row_B.tolist()]
        return self._hide(batch.with_inputs(input_ids=ids_BT), generators)

    def _hide(self, batch: Batch, generators: Sequence[torch.Generator]) -> Batch:
        ids_BT = batch.inputs["input_ids"]
        assert batch.adjustable_BT is not None
        assert self.mask_id is not None
        supervised_BT = torch.zeros_like(batch.adjustable_BT)
        for b, generator in enumerate(generators):
            place_n = batch.adjustable_BT[b].nonzero().squeeze(1)
            chosen_n = draw_masked(place_n.numel(), SHARE, generator).to(place_n.device)
            supervised_BT[b, place_n[chosen_n]] = True
        sequence_N, token_N = torch.nonzero(supervised_BT, as_tuple=True)
        made = batch.with_inputs(input_ids=ids_BT.masked_fill(supervised_BT, self.mask_id))
        made.position_N = sequence_N * ids_BT.shape[1] + token_N
        made.target_N = ids_BT[sequence_N, token_N]
        made.weight_N = torch.ones(sequence_N.numel(), device=ids_BT.device)
        made.sequence_N, made.supervised_BT = sequence_N, supervised_BT
        return made

    def encode(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Encoded:
        """Backbone over all tokens; its head over the supervised positions, up to the output embedding.

        Of an architecture that does more after its output embedding the finished logits are taken.
        """
        base = underlying(model)
        layer = base.get_output_embeddings()
        if base not in self._ends:
            self._ends[base] = ends_at(base, layer, {k: v[:1, :2] for k, v in batch.inputs.items()})
        last: list[torch.Tensor] = []
        entering: list[torch.Tensor] = []

        def at_positions(state_BTH: torch.Tensor) -> torch.Tensor:
            return state_BTH.reshape(-1, state_BTH.shape[-1]).index_select(0, batch.position_N)

        def after_body(module: Any, args: Any, out: Any) -> Any:
            last.append(at_positions(out.last_hidden_state))
            out.last_hidden_state = last[0][None]
            return out

        def before_output(module: Any, args: Any) -> Any:
            entering.append(args[0])
            return (args[0][:, :0],)  # the logits are formed by the head

        hooks = [base.base_model.register_forward_hook(after_body)]
        if self._ends[base]:
            hooks.append(layer.register_forward_pre_hook(before_output))
        try:
            out = model(**batch.inputs, output_hidden_states=hidden)
        finally:
            for hook in hooks:
                hook.remove()

        def at(index: int) -> torch.Tensor:
            return last[0] if index == -1 else at_positions(out.hidden_states[index])

        layers = at if hidden else None
        if not entering:
            return Encoded(logits_NV=out.logits[0], layers=layers)
        return Encoded(hidden_NH=entering[0][0], weight_VH=layer.weight, bias_V=layer.bias, layers=layers)


@torch.no_grad()
def ends_at(base: Any, layer: Any, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model's logits are what its output embedding gives and nothing is done to them afterwards.

    Asked of the model itself in one pass over a few tokens: the logits must be the very tensor that left the layer.

    Args:
        base: a transformers model.
        layer: its output embedding; anything but a plain linear layer is no end.
        inputs: what to ask it with.
    """
    if type(layer) is not torch.nn.Linear:
        return False
    given: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, out: given.append(out))
    was_training = base.training
    base.eval()  # no dropout is drawn, so the pass leaves the random numbers of training as they are
    try:
        logits_BTV = base(**inputs).logits
    finally:
        hook.remove()
        base.train(was_training)
    return len(given) == 1 and logits_BTV is given[0]
