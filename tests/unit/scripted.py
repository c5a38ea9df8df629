"""A tiny model whose answers are scripted, and runs with it: for procedures that let the model write."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import luthier
from luthier.core.protocols import Completion
from luthier.lab.tokenizer import tokenizer

POSITIONS = 96


def tiny(folder: Path, positions: int = POSITIONS) -> Path:
    """A Llama of 16 dimensions with the lab's tokenizer."""
    words = tokenizer(positions)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


class Script:
    """Stands in for a decoder: ``answer(prompt, number)`` is what it writes, None an answer that never ends.

    ``prompts`` are those it was asked, in order; ``left`` how many it still answers before it is killed.
    """

    def __init__(self, answer):
        self.answer, self.prompts, self.left = answer, [], None

    def __call__(self, model, prompts, ctx, **settings):
        if self.left == 0:
            raise KeyboardInterrupt
        found = []
        for ids in prompts:
            prompt = ctx.processor.decode(ids, skip_special_tokens=True)
            text = self.answer(prompt, self.prompts.count(prompt))
            self.prompts.append(prompt)
            tokens = ctx.processor(text or "", add_special_tokens=False)["input_ids"]
            end = [] if text is None else [ctx.processor.eos_token_id]
            found.append(Completion(text or "", (*tokens, *end), text is not None))
        if self.left is not None:
            self.left -= 1
        return found


def run(base, folder, rows, procedure, *, test=None, resume=False, training=None, **sections):
    """A short run of a procedure."""
    data = sections.pop("data", {})
    return luthier.tune(
        model=str(base),
        data={"train": rows, "keep": "none", **({"test": test} if test else {}), **data},
        procedure=procedure,
        training={"epochs": 1, "batch_rows": 4, "learning_rate": 1e-2, "log_steps": 1, **(training or {})},
        evaluation={"before": False, "generate": False, "calibration": False},
        output=str(folder),
        quiet=True,
        resume=resume,
        **sections,
    )


def tensors(made):
    """Copies of everything a run's model holds."""
    return {name: value.detach().clone() for name, value in made.model.state_dict().items()}


def same(a, b):
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
