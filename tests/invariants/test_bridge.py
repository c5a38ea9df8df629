"""Plain SFT through Luthier's loop and through transformers' Trainer is one trajectory."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from helpers import make_session, random_rows, settings, tiny_llama, weights
from luthier.core.errors import UserError
from luthier.engine.bridge_hf import BridgeTrainer
from luthier.engine.loop import Trainer

ROWS = 16


def arguments(tmp_path, **values):
    return TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=ROWS,
        max_steps=5,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **values,
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_plain_sft_is_one_trajectory(tmp_path, accumulation):
    rows = random_rows(ROWS)
    own, theirs = make_session(tiny_llama()), make_session(tiny_llama())
    training = settings(
        batch_rows=ROWS, max_steps=5, epochs=9, learning_rate=1e-3, schedule="constant", max_grad_norm=0.5
    )
    losses = []
    Trainer(
        own, rows, training, observe=lambda event, values: losses.append(values["loss"]) if event == "step" else None
    ).run()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    args.per_device_train_batch_size = ROWS // accumulation
    bridge = BridgeTrainer(session=theirs, data=rows, args=args)
    bridge.train()
    found = [entry["loss"] for entry in bridge.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), atol=1e-4, rtol=1e-4)
    for name, value in weights(own.model).items():
        torch.testing.assert_close(dict(theirs.model.named_parameters())[name].detach(), value, atol=1e-4, rtol=1e-3)


class Selects:
    oversample = 1


def test_online_selection_is_refused(tmp_path):
    with pytest.raises(UserError, match="online selection needs"):
        BridgeTrainer(session=make_session(selector=Selects()), data=random_rows(4), args=arguments(tmp_path))
