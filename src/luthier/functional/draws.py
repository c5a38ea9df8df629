"""Many draws per position from ``q = softmax(z / temperature)``, by the inverse of its distribution function.

The vocabulary is cut into segments. A number u in [0, 1) finds its segment in the running sum of the segments' masses,
and its token in the running sum within the segment: few passes over the vocabulary, then work that grows with the
number of draws only. No table of counts over the vocabulary is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from luthier.core.rng import stream

# Rows are worked on in blocks of about this many bytes, so that on a CPU they stay in its cache.
_BLOCK_BYTES = {"cpu": 4 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20
_SEGMENT = 32


def support_floor(
    logits_CV: torch.Tensor, temperature: float, *, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor | None:
    """The lowest logit [C, 1] that may be drawn, None where all may.

    Args:
        logits_CV: the logits z.
        temperature: of q.
        top_k: only this many most likely tokens (and those equal to the last of them).
        top_p: of these only the most likely ones that together reach this probability.
    """
    if top_k is None and top_p is None:
        return None
    kept = logits_CV.shape[1] if top_k is None else min(top_k, logits_CV.shape[1])
    sorted_CV = logits_CV.topk(kept).values
    if top_p is None:
        return sorted_CV[:, -1:]
    q_CV = torch.softmax(sorted_CV / temperature, -1)
    # A token stays where those before it have not reached the sum; the first always does.
    stays_CV = q_CV.cumsum(-1) - q_CV < top_p
    return sorted_CV.gather(1, stays_CV.sum(-1, keepdim=True).clamp(min=1) - 1)


def tempered(
    logits_CV: torch.Tensor, temperature: float, floor_C1: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``q`` [C, V], that is ``softmax(logits / temperature)`` over the logits that are not below the floor."""
    scaled_CV = torch.mul(logits_CV, 1 / temperature, out=out)
    if floor_C1 is not None:
        scaled_CV.masked_fill_(logits_CV < floor_C1, -torch.inf)
    return torch.softmax(scaled_CV, -1, out=scaled_CV)


def draw(
    logits_CV: torch.Tensor,
    uniform_CK: torch.Tensor,
    target_C: torch.Tensor,
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K ids drawn from q with replacement, behind them the target's, and the probabilities of all under q: [C, K + 1].

    Args:
        logits_CV: logits z; a row with a NaN gives ids that mean nothing and probabilities of NaN.
        uniform_CK: numbers in [0, 1), one for each draw; the same numbers give the same ids.
        target_C: int64.
        temperature: above 0.
        top_k: see :func:`support_floor`.
        top_p: see :func:`support_floor`.
    """
    logits_CV = logits_CV.detach()
    rows, width = logits_CV.shape
    segments = -(-width // _SEGMENT)
    limit = _BLOCK_BYTES.get(logits_CV.device.type, _BLOCK_BYTES_ELSEWHERE)
    block = max(1, min(rows, limit // (segments * _SEGMENT * logits_CV.element_size())))
    # Behind the vocabulary stand zeros up to a whole number of segments.
    padded = logits_CV.new_zeros((block, segments * _SEGMENT))
    uniform_CK = uniform_CK.to(logits_CV.dtype)
    ids_Ck = torch.cat([torch.zeros_like(uniform_CK, dtype=torch.int64), target_C[:, None]], 1)
    q_Ck = logits_CV.new_empty(ids_Ck.shape)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        z, u, used = logits_CV[part], uniform_CK[part], padded[: min(block, rows - start)]
        floor_C1 = support_floor(z, temperature, top_k=top_k, top_p=top_p)
        q = tempered(z, temperature, floor_C1, out=used[:, :width])
        cut = used.view(-1, segments, _SEGMENT)
        running = cut.sum(-1).cumsum(-1)
        wanted = u * running[:, -1:]
        segment = _first_above(running, wanted)
        before = torch.where(segment > 0, running.gather(1, (segment - 1).clamp_(min=0)), 0.0)
        row = torch.arange(0, len(z) * segments, segments, device=z.device)[:, None]
        inside = cut.view(-1, _SEGMENT).index_select(0, (segment + row).flatten()).cumsum(-1)
        token = _first_above(inside, (wanted - before).view(-1, 1)).view_as(segment)
        ids_Ck[part, :-1] = (segment * _SEGMENT + token).clamp_(max=width - 1)
        q_Ck[part] = q.gather(1, ids_Ck[part])
    return ids_Ck, q_Ck


def _first_above(running: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Index of the first running sum above each wanted number; never one that a zero has been added to."""
    # The sums of the two levels may differ by a rounding, so that a number lies at or behind the end of its segment.
    below_end = running[..., -1:] * (1 - torch.finfo(running.dtype).eps)
    found = torch.searchsorted(running, torch.minimum(wanted, below_end), right=True)
    return found.clamp_(max=running.shape[-1] - 1)


def by_prompt(prompts: Sequence[Sequence[int]], most: int, seed: int) -> torch.Tensor:
    """Uniform numbers float32 [prompts, most], each row decided by its prompt and by how often it was there before.

    So neither the order of the prompts nor what else is asked changes what is drawn for one of them.

    Args:
        prompts: token ids.
        most: numbers of each.
        seed: of all.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in map(tuple, prompts):
        rows.append(torch.rand(most, generator=stream(seed, "rollout", prompt, seen[prompt])))
        seen[prompt] += 1
    return torch.stack(rows) if rows else torch.zeros(0, most)
