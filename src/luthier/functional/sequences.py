"""Token sequences for generation: groups of similar length, left padding, cutting at a stop token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

import torch


def length_groups(lengths: Sequence[int], size: int, *, equal: bool = False) -> list[list[int]]:
    """Indices in groups of at most ``size``, sorted by length (longest first, so that memory runs out at once).

    Args:
        lengths: of the sequences.
        size: largest group.
        equal: only sequences of one length in a group.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    runs = [list(run) for _, run in itertools.groupby(order, lengths.__getitem__)] if equal else [order]
    return [run[start : start + size] for run in runs for start in range(0, len(run), size)]


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids [B, T] padded on the left, and the attention mask [B, T] that is 1 on real tokens.

    Args:
        rows: token ids, at least one each.
        pad_id: fills the padding; what it is does not matter, the mask says what is padding.
    """
    width = max(len(r) for r in rows)
    ids_BT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids_BT[index, width - len(row) :] = torch.as_tensor(row, dtype=torch.long)
        mask_BT[index, width - len(row) :] = 1
    return ids_BT, mask_BT


def cut_after_stop(ids: Sequence[int], stop: Collection[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens up to and with the first stop token, and whether there was one."""
    for index, token in enumerate(ids):
        if token in stop:
            return tuple(ids[: index + 1]), True
    return tuple(ids), False


NEUTRAL = {
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "use_cache": True,
}
"""Generation settings of transformers that change no probability, given in full because a model's own
``generation_config`` fills whatever is left out."""


def stop_tokens(*sources: int | Sequence[int] | None) -> list[int]:
    """The sorted union of stop token ids given as one id, a list, or None."""
    found: set[int] = set()
    for source in sources:
        found.update([source] if isinstance(source, int) else source or [])
    return sorted(found)


def complete(
    write: Callable[[torch.Tensor, torch.Tensor, int, list[int]], torch.Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    stop: Collection[int],
    pad_id: int,
    batch_rows: int,
    max_new_tokens: int,
    context: int | None = None,
    equal: bool = False,
) -> list[tuple[tuple[int, ...], bool]]:
    """Complete prompts in left-padded groups of similar length.

    Args:
        write: ``(ids_BT, mask_BT, most, index) -> new_BT``, at most ``most`` new tokens for each row of a group;
            ``index`` tells which prompts they are.
        prompts: token ids, at least one each.
        stop: token ids that end a completion.
        pad_id: padding.
        batch_rows: rows of a group.
        max_new_tokens: longest completion.
        context: positions the model has; a completion ends where they are used up.
        equal: only prompts of one length in a group, so that nothing is padded.

    Returns:
        For each prompt, in order, its new token ids (the stop token included) and whether it stopped by itself. A
        prompt that fills the context has an empty, unfinished completion.
    """
    done: list[tuple[tuple[int, ...], bool]] = [((), False)] * len(prompts)
    for group in length_groups([len(p) for p in prompts], batch_rows, equal=equal):
        longest = len(prompts[group[0]])
        most = max_new_tokens if context is None else min(max_new_tokens, context - longest)
        # Padding to a row near the limit must not shorten its neighbours, so such rows go one by one.
        parts = [group] if most == max_new_tokens else [[index] for index in group]
        for part in parts:
            ids_BT, mask_BT = left_pad([prompts[i] for i in part], pad_id)
            room = max_new_tokens if context is None else min(max_new_tokens, context - ids_BT.shape[1])
            if room > 0:
                for index, row in zip(part, write(ids_BT, mask_BT, room, part).tolist(), strict=True):
                    done[index] = cut_after_stop(row, stop)
    return done
