"""Decoding with early exits: a depth for each token, and drafting with a part of the model (self-speculation).

One prompt at a time. Exits are block numbers; ``bounds = (0, *exits)`` cut the model into segments. A token that leaves
early has no keys and values in deeper segments; it waits there until a later token goes that deep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from luthier.functional.exits import Blocks

Choose = Callable[[torch.Tensor], int]
Observe = Callable[[int, float, int], None]


@dataclass
class Written:
    """What was written for one prompt.

    Attributes:
        ids: token ids, a stop token included.
        depths: blocks that ran for each token (dynamic).
        drafted, accepted, passes: drafted tokens, those kept, and verifying passes (speculative).
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    passes: int = 0


def distribution(logits_V: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities [V] in float64; temperature 0 puts all on the most likely token."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).double()
    return torch.softmax(logits_V.double() / temperature, dim=-1)


def draw(p_V: torch.Tensor, generator: torch.Generator) -> int:
    """A token drawn from probabilities; always the same one where one has all."""
    return int(torch.multinomial(p_V.cpu(), 1, generator=generator))


def verify(
    full_GV: torch.Tensor, draft_gV: Sequence[torch.Tensor], drafts: Sequence[int], generator: torch.Generator
) -> tuple[int, int]:
    """How many drafted tokens stand, and the full model's token after them; distributed as the full model's own.

    Token t stands with probability ``min(1, p_full(t) / p_draft(t))``. At the first that falls the next token is drawn
    from the normalised ``max(0, p_full - p_draft)``; where all stand, from the full model.

    Args:
        full_GV: the full model's probabilities after each drafted prefix, one more row than drafts.
        draft_gV: what each draft was drawn from.
        drafts: the drafted tokens.
        generator: on the CPU.
    """
    for index, (token, draft_V) in enumerate(zip(drafts, draft_gV, strict=True)):
        full_V = full_GV[index]
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        if float(uniform) * float(draft_V[token]) >= float(full_V[token]):
            rest_V = (full_V - draft_V).clamp_min(0)
            return index, draw(rest_V / rest_V.sum(), generator)
    return len(drafts), draw(full_GV[len(drafts)], generator)


@torch.no_grad()
def dynamic(
    blocks: Blocks,
    prompt_1T: torch.Tensor,
    *,
    exits: Sequence[int],
    thresholds: Sequence[float],
    choose: Choose,
    most: int,
    stop: Collection[int],
    propagate: bool = True,
    observe: Observe | None = None,
) -> Written:
    """Write each token at the first exit whose largest probability reaches its threshold.

    Args:
        blocks: the model.
        prompt_1T: token ids.
        exits: increasing, the last being the whole model.
        thresholds: one for each exit but the last; above 1 never leaves there.
        choose: a token from the logits [V] of the exit.
        most: tokens to write.
        stop: tokens that end the text.
        propagate: a written token's deeper keys and values are made from its exit's hidden state; otherwise the missing
            blocks run for it once a later token needs them. Those of the prompt are always exact.
        observe: called with (segment, largest probability, most likely token) at each exit that is tried.
    """
    bounds, cache, done = (0, *exits), blocks.cache(), Written()
    # What waits before each segment: hidden states to run through it, and those to make keys and values from.
    exact: list[list[torch.Tensor]] = [[] for _ in bounds]
    copied: list[list[torch.Tensor]] = [[] for _ in bounds]
    fresh = prompt_1T
    while len(done.ids) < most:
        hidden: torch.Tensor | None = None
        for segment, (first, last) in enumerate(pairwise(bounds)):
            waiting, kept = exact[segment], copied[segment]
            if hidden is None:
                logits, hidden = blocks.run(first, last, fresh, cache=cache, logits=1)
            else:
                count = hidden.shape[1]
                if kept and waiting:  # positions must be stored in order: the prompt's come first
                    caught_up = blocks.run(first, last, entering=torch.cat(waiting, 1), cache=cache)[1]
                    exact[segment + 1].append(caught_up)
                    waiting.clear()
                if kept:
                    blocks.store(first, last, torch.cat(kept, 1), cache)
                joint = torch.cat([*waiting, hidden], 1)
                logits, left = blocks.run(first, last, entering=joint, cache=cache, logits=1)
                if waiting:
                    exact[segment + 1].append(left[:, :-count])
                hidden = left[:, -count:]
                waiting.clear()
                kept.clear()
            assert logits is not None
            assert hidden is not None
            logits_V = logits[0, -1].float()
            confidence, top = torch.softmax(logits_V, dim=-1).max(dim=-1)
            if observe is not None:
                observe(segment, float(confidence), int(top))
            if segment == len(exits) - 1 or float(confidence) >= thresholds[segment]:
                break
        assert hidden is not None
        if segment < len(exits) - 1:
            if propagate and done.ids:
                for deeper in range(segment + 1, len(exits)):
                    copied[deeper].append(hidden)
            else:
                exact[segment + 1].append(hidden)
        done.ids.append(choose(logits_V))
        done.depths.append(exits[segment])
        if done.ids[-1] in stop:
            break
        fresh = torch.tensor([[done.ids[-1]]], device=prompt_1T.device)
    return done


@torch.no_grad()
def speculative(
    blocks: Blocks,
    prompt_1T: torch.Tensor,
    *,
    exit: int,
    draft_length: int,
    temperature: float,
    generator: torch.Generator,
    most: int,
    stop: Collection[int],
    draft_confidence: float = 0.0,
) -> Written:
    """Draft with the first ``exit`` blocks, verify in one pass of the others; the text is the full model's own.

    Args:
        blocks: the model.
        prompt_1T: token ids.
        exit: blocks that draft; verification starts from what left them.
        draft_length: most tokens drafted before a verification.
        temperature: of both distributions; 0 is greedy.
        generator: on the CPU.
        most: tokens to write.
        stop: tokens that end the text.
        draft_confidence: drafting pauses where the draft's largest probability is below it.
    """
    cache, done, fresh, length = blocks.cache(), Written(), prompt_1T, 0
    while True:
        room = min(draft_length, most - len(done.ids) - 1)
        drafts: list[int] = []
        drawn_from: list[torch.Tensor] = []
        waiting: list[torch.Tensor] = []
        while True:
            more = len(drafts) < room
            logits, left = blocks.run(0, exit, fresh, cache=cache, logits=int(more))
            waiting.append(left)
            length += fresh.shape[1]
            if logits is None:
                break
            logits_V = logits[0, -1].float()
            if draft_confidence > 0 and float(torch.softmax(logits_V, -1).max()) < draft_confidence:
                break
            drawn_from.append(distribution(logits_V, temperature))
            drafts.append(draw(drawn_from[-1], generator))
            fresh = torch.tensor([[drafts[-1]]], device=prompt_1T.device)
        count = len(drafts) + 1
        logits, _ = blocks.run(exit, blocks.depth, entering=torch.cat(waiting, 1), cache=cache, logits=count)
        assert logits is not None
        full_GV = torch.stack([distribution(row, temperature) for row in logits[0].float()])
        accepted, token = verify(full_GV, drawn_from, drafts, generator)
        length -= len(drafts) - accepted
        cache.cut(length)
        done.drafted, done.accepted, done.passes = (
            done.drafted + len(drafts),
            done.accepted + accepted,
            done.passes + 1,
        )
        for new in (*drafts[:accepted], token):
            done.ids.append(new)
            if new in stop or len(done.ids) == most:
                return done
        fresh = torch.tensor([[token]], device=prompt_1T.device)


def agreement(confidence_NM: np.ndarray, agrees_NM: np.ndarray, thresholds: Sequence[float]) -> float:
    """Share of positions at which the exit that these thresholds choose writes the full model's token.

    Args:
        confidence_NM: largest probability at each exit but the last.
        agrees_NM: whether its token is the full model's.
        thresholds: M of them.
    """
    leaves_NM = confidence_NM >= np.asarray(thresholds)
    first_N = leaves_NM.argmax(1)
    rows = np.arange(len(first_N))
    return float(np.where(leaves_NM.any(1), agrees_NM[rows, first_N], True).mean())


def calibrate(confidence_NM: np.ndarray, agrees_NM: np.ndarray, target: float, *, each: bool = False) -> list[float]:
    """The smallest thresholds at which agreement with the full model reaches ``target``.

    Args:
        confidence_NM: largest probability at each exit but the last, [N, M].
        agrees_NM: whether the exit's token is the full model's, [N, M].
        target: share of positions that must agree.
        each: a threshold for each exit, such that those leaving there agree that often; otherwise one for all.

    Returns:
        M thresholds; just above 1 where no other reaches the target.
    """
    count = confidence_NM.shape[1]
    never = float(np.nextafter(1.0, 2.0))
    if not each:
        candidates = [0.0, *np.unique(confidence_NM).tolist()]
        chosen = next(
            (t for t in candidates if agreement(confidence_NM, agrees_NM, [t] * count) >= target),
            never,
        )
        return [float(chosen)] * count
    found = []
    for confidence_N, agrees_N in zip(confidence_NM.T, agrees_NM.T, strict=True):
        candidates = [0.0, *np.unique(confidence_N).tolist()]
        found.append(next((t for t in candidates if agrees_N[confidence_N >= t].mean() >= target), never))
    return [float(t) for t in found]
