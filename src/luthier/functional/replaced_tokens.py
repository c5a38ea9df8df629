"""Replaced-token detection: tokens that a small masked language model wrote are to be told from the original ones.

    x_m   x with a share of its tokens hidden
    x_r   x with each hidden token replaced by a sample of softmax(generator(x_m)); no gradient through the sampling
    r_t = 1 if x_r,t != x_t else 0                    a sample that is the original counts as original
    L_RTD = sum_t BCE(z_t, r_t)                       over tokens that are neither special nor padding

``z_t`` is the discriminator's logit for "replaced". Sampling is by the inverse of the cumulative distribution, one
uniform number for each token, so that it depends on that number and the logits alone.

Papers: "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators", 2020, arXiv 2003.10555;
gradient-disentangled embedding sharing: "DeBERTaV3: Improving DeBERTa using ELECTRA-Style Pre-Training with
Gradient-Disentangled Embedding Sharing", 2021, arXiv 2111.09543.
"""

from __future__ import annotations

import torch


def draw_masked(count: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Which of ``count`` tokens are hidden: ``share`` of them, rounded, and one at least.

    Args:
        count: tokens that may be hidden.
        share: the share, in (0, 1].
        generator: where the choice is drawn.

    Returns:
        int64 numbers below ``count``, increasing; none where ``count`` is 0.
    """
    wanted = min(count, max(1, round(share * count)))
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def sample_tokens(logits_CV: torch.Tensor, uniform_C: torch.Tensor) -> torch.Tensor:
    """One token of ``softmax(logits)`` for each row, without gradient.

    The token is the first whose cumulative probability exceeds the uniform number.

    Args:
        logits_CV: logits.
        uniform_C: numbers in [0, 1), on any device.

    Returns:
        int64 [C].
    """
    with torch.no_grad():
        # In float32 the sums over a large vocabulary would be too coarse for rare tokens.
        running_CV = torch.softmax(logits_CV.detach().double(), dim=-1).cumsum(dim=-1)
        level_C = uniform_C.to(running_CV) * running_CV[:, -1]
        found_C = torch.searchsorted(running_CV, level_C[:, None], right=True).squeeze(1)
        return found_C.clamp(max=logits_CV.shape[-1] - 1)


def put(ids_BT: torch.Tensor, position_N: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """A copy of the ids with others at some positions of the flattened batch."""
    changed_BT = ids_BT.clone()
    changed_BT.view(-1)[position_N] = ids_N.to(ids_BT)
    return changed_BT


def detection_loss(logit_BT: torch.Tensor, replaced_BT: torch.Tensor, weight_BT: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the weighted binary cross-entropy, in float32 at least.

    Args:
        logit_BT: logit of "replaced".
        replaced_BT: bool, r_t.
        weight_BT: 0 for special tokens and padding, 1 (or the weight of the row) elsewhere.
    """
    wide_BT = logit_BT if logit_BT.dtype == torch.float64 else logit_BT.float()
    loss_BT = torch.nn.functional.binary_cross_entropy_with_logits(wide_BT, replaced_BT.to(wide_BT), reduction="none")
    return (loss_BT * weight_BT.to(wide_BT)).sum()


class DisentangledEmbedding(torch.nn.Module):
    """Gradient-disentangled embedding sharing: ``e(x) = sg(E_G)[x] + Delta[x]``, Delta starting at 0.

    The generator alone trains its table E_G; the discriminator reads it and trains its own difference.

    Args:
        shared: the generator's embedding. It stays the generator's: its weight is none of this module's parameters.

    Raises:
        ValueError: an embedding that does more than look up rows.
    """

    def __init__(self, shared: torch.nn.Embedding) -> None:
        super().__init__()
        if type(shared) is not torch.nn.Embedding or shared.max_norm is not None:
            raise ValueError(f"{type(shared).__name__} does more than look up rows of a table")
        # In a tuple, so that torch does not count it among the modules of this one.
        self._shared = (shared,)
        self.padding_idx = shared.padding_idx
        self.delta = torch.nn.Parameter(torch.zeros_like(shared.weight))

    @property
    def weight(self) -> torch.Tensor:
        """[V, H] the table as the discriminator sees it; with gradient to the difference alone."""
        return self._shared[0].weight.detach() + self.delta

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, H] embeddings."""
        lookup = torch.nn.functional.embedding
        table_VH = self._shared[0].weight.detach()
        return lookup(ids_BT, table_VH) + lookup(ids_BT, self.delta, self.padding_idx)

    def export(self) -> torch.nn.Embedding:
        """A plain embedding with both added: it computes what this one computes, bit for bit."""
        weight_VH = self.weight.detach().clone()
        plain = torch.nn.Embedding.from_pretrained(weight_VH, freeze=False, padding_idx=self.padding_idx)
        return plain.train(self.training)
