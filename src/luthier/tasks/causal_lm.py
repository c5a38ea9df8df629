"""Causal language models: one supervised position per target token.

The hidden state at token j-1 predicts token j. Only the backbone runs over all tokens; the output embedding is applied
by the log-prob head at supervised positions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch
from luthier.tasks.base import ROW_WEIGHT, Encoded, carried, pad, row_weights
from luthier.tasks.virtual_tokens import with_virtual_tokens

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


def output_scale(config: Any) -> tuple[float, float | None]:
    """(factor on the logits, soft cap) that some architectures apply after the output embedding."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    if divisor := getattr(text, "logits_scaling", None):
        scale /= float(divisor)
    if factor := getattr(text, "lm_head_multiplier", None):
        scale *= float(factor)
    return scale, getattr(text, "final_logit_softcapping", None)


def underlying(model: Any) -> Any:
    """The transformers model itself, beneath adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def final_norm(base: Any) -> torch.nn.Module:
    """The norm between the last block and the output embedding.

    Raises:
        UserError: the architecture has none that is known.
    """
    decoder = base.get_decoder()
    for name in FINAL_NORMS:
        if isinstance(found := getattr(decoder, name, None), torch.nn.Module):
            return found
    raise UserError(f"{type(base).__name__} has no final norm that is known, so it has no early exits.")


@contextmanager
def tied_gradient_by_rows(model: Any) -> Iterator[None]:
    """Within the block, a tied input embedding gives its gradient as rows to add to that of the output layer.

    By default it is a second matrix of the vocabulary's size, nearly all of it zeros that are made and added. Where the
    loss does not reach the output layer, the gradient stays by rows (sparse).
    """
    base = underlying(model)
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    tied = isinstance(inner, torch.nn.Embedding) and inner.weight is getattr(outer, "weight", None)
    if not tied or inner.sparse or not inner.weight.requires_grad:
        yield
        return
    inner.sparse = True
    try:
        yield
    finally:
        inner.sparse = False


class CausalLM:
    """Next-token prediction over rows of token ids with supervised spans."""

    name = "causal-lm"
    reads: tuple[str, ...] = ("input_ids", "spans", ROW_WEIGHT)

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        pad_id = getattr(processor, "pad_token_id", None)
        end = getattr(processor, "eos_token_id", None)
        self.pad_id = next((i for i in (pad_id, end) if i is not None), 0)
        special = set(getattr(processor, "all_special_ids", []) or []) - {end}
        self.special = torch.tensor(sorted(special), dtype=torch.long)

    def collate(self, rows: Mapping[str, Sequence[Any]], index_B: Any, columns: Sequence[str] = ()) -> Batch:
        """Rows of ``input_ids`` and flat ``spans``; padding is known by the mask, never by an id."""
        ids_BT, mask_BT = pad(rows["input_ids"], self.pad_id)
        width = ids_BT.shape[1]
        # +1 where a span starts and -1 where it ends; the running sum is positive inside.
        edges = np.zeros((len(rows["spans"]), width + 1), dtype=np.int64)
        counts = np.fromiter((len(s) for s in rows["spans"]), dtype=np.int64, count=len(rows["spans"]))
        ends = np.concatenate([np.asarray(s, dtype=np.int64) for s in rows["spans"]])
        signs = 1 - 2 * (np.arange(len(ends)) % 2)
        np.add.at(edges, (np.repeat(np.arange(len(counts)), counts), ends), signs)
        supervised_BT = torch.from_numpy(edges.cumsum(axis=1)[:, :width] > 0)
        supervised_BT[:, 0] = False  # nothing stands before the first token to predict it from
        example_N, token_N = torch.nonzero(supervised_BT, as_tuple=True)
        return Batch(
            inputs={"input_ids": ids_BT, "attention_mask": mask_BT.long()},
            position_N=example_N * width + token_N - 1,
            target_N=ids_BT[example_N, token_N],
            weight_N=row_weights(rows, example_N),
            sequence_N=example_N,
            row_B=torch.as_tensor(np.asarray(index_B), dtype=torch.long),
            columns=carried(rows, columns),
            keys_B=list(rows["key"]) if "key" in rows else None,
            adjustable_BT=mask_BT & ~torch.isin(ids_BT, self.special),
            supervised_BT=supervised_BT,
        )

    def encode(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Encoded:
        """Backbone over all tokens, hidden states gathered at the supervised positions."""
        base = underlying(model)
        inputs, ahead = with_virtual_tokens(model, batch.inputs)
        out = base.get_decoder()(**inputs, use_cache=False, output_hidden_states=hidden)

        def at_positions(state_BTH: torch.Tensor) -> torch.Tensor:
            return state_BTH[:, ahead:].reshape(-1, state_BTH.shape[-1]).index_select(0, batch.position_N)

        layer = base.get_output_embeddings()
        if not isinstance(layer, torch.nn.Linear):
            raise UserError(
                f"the output layer of {type(base).__name__} is a {type(layer).__name__}, not a linear map: "
                "adapters on the output embedding are not supported; leave 'lm_head' out of their target modules."
            )
        scale, softcap = output_scale(base.config)
        states = (*out.hidden_states[:-1], out.last_hidden_state) if hidden else ()

        def exit_after(block: int) -> torch.Tensor:
            # states[n] is what leaves block n; only the last of them has passed the final norm.
            if not 1 <= block < len(states):
                raise UserError(f"there is no exit after block {block}: the model has {len(states) - 1} blocks.")
            state = at_positions(states[block])
            return state if block == len(states) - 1 else final_norm(base)(state)

        return Encoded(
            hidden_NH=at_positions(out.last_hidden_state),
            weight_VH=layer.weight,
            bias_V=layer.bias,
            scale=scale,
            softcap=softcap,
            layers=(lambda index: at_positions(states[index])) if hidden else None,
            exits=exit_after if hidden else None,
        )
