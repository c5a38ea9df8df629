"""Digit strings: a language of small tasks on which merging weights can be watched in seconds.

A row is a task token, five digits, a separator, the answer's five digits and an end token; the answer is supervised. The
model is a Llama of 4 layers and width 64. Accuracy is the share of rows whose five digits are all the most likely ones.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

DIGITS, SEPARATOR, END, LENGTH = 3, 13, 2, 5
ANSWERS = {
    "copy": lambda x: x,
    "reverse": lambda x: x[:, ::-1],
    "sort": lambda x: np.sort(x, axis=1),
    "rotate": lambda x: np.roll(x, 2, axis=1),
    "add 3": lambda x: (x + 3) % 10,
}
TOKEN = {task: 14 + i for i, task in enumerate(ANSWERS)}
PRETRAINED = ("copy", "reverse", "sort", "rotate")


def fresh(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=16,
            tie_word_embeddings=False,
        )
    )


def rows(tasks, count, rng, *, noise=0.0, digits=10):
    """Token ids [count, 13]; with ``noise`` that share of the answers is another random string's."""
    task_B = rng.integers(len(tasks), size=count)
    x = rng.integers(digits, size=(count, LENGTH))
    wrong = rng.random(count) < noise
    source = np.where(wrong[:, None], rng.integers(digits, size=x.shape), x)
    answer = np.zeros_like(x)
    for i, task in enumerate(tasks):
        answer[task_B == i] = ANSWERS[task](source[task_B == i])
    head = np.array([TOKEN[t] for t in tasks])[task_B][:, None]
    ends = [np.full((count, 1), v) for v in (SEPARATOR, END)]
    return torch.from_numpy(np.hstack([head, x + DIGITS, ends[0], answer + DIGITS, ends[1]]))


def loss_of(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, 6:-1].reshape(-1, 32), ids[:, 7:].reshape(-1))


def train(model, tasks, steps, rate, seed, *, noise=0.0, batch=32, decay=True, at=(), watch=None, weight_decay=0.01):
    """AdamW in place, linear decay to zero; gives copies of the weights after the steps in ``at``."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay)
    kept = {}
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps if decay else 1.0)
        ids = rows(tasks, batch, rng, noise=noise)
        loss = loss_of(model(input_ids=ids, use_cache=False).logits, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step + 1 in at:
            kept[step + 1] = state(model)
        if watch and step + 1 in watch:
            watch[step + 1](model)
            model.train()
    model.eval()
    return kept


def state(model):
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def with_weights(model, tensors):
    """A copy of the model with other weights."""
    other = copy.deepcopy(model)
    other.load_state_dict({n: t.to(torch.float32) for n, t in tensors.items()})
    return other.eval()


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


def accuracy(model, task, *, seed=12345, count=512, digits=10):
    ids = rows([task], count, np.random.default_rng(seed), digits=digits)
    return exact(logits(model, ids), ids)


def exact(logits_BTV, ids):
    return float((logits_BTV[:, 6:-2].argmax(-1) == ids[:, 7:-1]).all(1).double().mean())
