"""Random Markov chains as languages for a small transformer: rows, pretraining, and the loss on fresh rows."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import MemoryRows, make_session, settings
from luthier.engine.loop import Trainer

TOKENS, FIRST, LENGTH = 64, 3, 32


def chain(rng):
    """[64, 64] transition probabilities, each row concentrated on a few successors."""
    return rng.dirichlet(np.full(TOKENS, 0.1), size=TOKENS)


def changed(transitions, rng, count):
    """The chain with ``count`` rows drawn anew."""
    other = transitions.copy()
    rows = rng.choice(TOKENS, size=count, replace=False)
    other[rows] = rng.dirichlet(np.full(TOKENS, 0.1), size=count)
    return other


def rows_of(transitions, rng, count):
    """Walks of 32 tokens, all of them supervised but the first."""
    walks = np.empty((count, LENGTH), int)
    walks[:, 0] = rng.integers(TOKENS, size=count)
    cumulative = transitions.cumsum(1)
    for t in range(1, LENGTH):
        draws = rng.random((count, 1))
        walks[:, t] = np.minimum((cumulative[walks[:, t - 1]] < draws).sum(1), TOKENS - 1)
    return MemoryRows([((walk + FIRST).tolist(), [1, LENGTH]) for walk in walks])


def transformer(seed, layers=4, hidden=64):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS + FIRST,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )


def train(model, rows, *, method=None, steps, seed, learning_rate=1e-3, batch_rows=16, **values):
    """Train in place; returns the session."""
    session = make_session(model, seed=seed, **({} if method is None else {"parameters": [method]}))
    epochs = float(steps * batch_rows / len(rows) + 1)
    about = {"learning_rate": learning_rate, "batch_rows": batch_rows, "epochs": epochs, "max_steps": steps}
    Trainer(session, rows, settings(**{**about, **values})).run()
    return session


def loss_on(model, rows):
    """Mean loss in nats per token."""
    session = make_session(copy.deepcopy(model))
    session.model.eval()
    batch = session.task.collate(rows.fetch(range(len(rows))), np.arange(len(rows)))
    return float(-session.evaluate_batch(batch, ("logp",)).logp_N.mean())
