"""Prompt and prefix tuning beneath the task: the virtual tokens that peft's own forward pass would put in front.

Tasks run a model's backbone without its head, and so without the forward pass in which peft adds them.
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.functional.adapters import virtual_tokens


def with_virtual_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, Any], int]:
    """What the backbone takes, and how many positions of its output stand before those of the inputs.

    Args:
        model: the model; anything but a peft model with virtual tokens leaves the inputs as they are.
        inputs: ``input_ids`` and ``attention_mask`` [B, T], right-padded.
    """
    ahead = virtual_tokens(model)
    if not ahead:
        return inputs, 0
    mask_BT = inputs["attention_mask"]
    rows = len(mask_BT)
    inputs = {**inputs, "attention_mask": torch.cat([mask_BT.new_ones(rows, ahead), mask_BT], dim=1)}
    made = model.get_prompt(rows)
    if model.active_peft_config.peft_type == "PREFIX_TUNING":
        return {**inputs, "past_key_values": made}, 0
    embedded_BTH = model.word_embeddings(inputs.pop("input_ids"))
    return {**inputs, "inputs_embeds": torch.cat([made.to(embedded_BTH.dtype), embedded_BTH], dim=1)}, ahead
