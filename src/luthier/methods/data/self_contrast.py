"""Self-contrast: the model's own answers that are unlike the given one become rejected answers for DPO.

    y_1 .. y_n ~ p(. | x)                       n ``samples`` from the fine-tuned model, temperature 1
    s_j  = cos( e(y_j), e(y) )                  similarity of embeddings to the given answer y
    pool = the distinct answers among the p least similar       (likely good answers are thrown away)
    y-_1 .. y-_k  drawn from the pool without replacement       the column ``negatives``

The objective ``dpo`` with ``rejected_from: negatives`` learns from them: its loss is the mean over the k pairs of a
prompt, so a step holds as many prompts whatever k is. A prompt whose pool holds fewer than k is dropped; how many that
are is in the report, for it favours prompts with diverse answers.

``mode: lastdedup`` is the method. ``last`` keeps copies; ``alldedup`` and ``all`` do not filter (``alldedup`` with one
negative makes SPIN's pairs). ``encoder``: ``tfidf`` (character n-grams), ``model`` (mean of the model's last hidden
states), or the name of a sentence-transformers model (the paper: WhereIsAI/UAE-Large-V1). The first two are this
library's, for work without a download.

The model of the recipe is the one that has been fine-tuned on the same rows; the procedure of the same name does both.

Paper: "Extensive Self-Contrast Enables Feedback-Free Language Model Alignment", 2024, arXiv 2404.00604. Official
repository: THUDM/Self-Contrast.

Example::

    model: runs/sft/model
    data: {train: rows.jsonl, stages: [self-contrast: {samples: 32, negatives: 8}]}
    objective: {dpo: {beta: 0.1, rejected_from: negatives}}
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import UserError, missing_extra
from luthier.core.protocols import Completion
from luthier.core.registry import data_stage
from luthier.core.rng import numpy_stream
from luthier.functional.discriminative import as_answer, given_answer, place
from luthier.functional.rows import with_columns
from luthier.functional.self_contrast import Mode, cosine, pool

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

SLUG, COLUMN = "self-contrast", "negatives"
ENCODED = 32


@data_stage(
    "self-contrast",
    example={"samples": 4, "negatives": 1, "max_new_tokens": 8},
    tasks=("causal-lm",),
    paper="Extensive Self-Contrast Enables Feedback-Free Language Model Alignment, 2024, arXiv 2404.00604",
)
class SelfContrast:
    """Self-contrast: the model's own answers that are unlike the given one become rejected answers."""

    def __init__(
        self,
        *,
        samples: Annotated[int, Field(ge=1, description="n, answers drawn for each prompt")] = 32,
        negatives: Annotated[int, Field(ge=1, description="k, how many of them are rejected answers")] = 8,
        share: Annotated[float, Field(gt=0, le=1, description="p, share of the least similar answers kept")] = 0.75,
        mode: Annotated[Mode, Field(description="the filter, or none")] = "lastdedup",
        encoder: Annotated[
            str, Field(min_length=1, description="tfidf, model, or a sentence-transformers model")
        ] = "tfidf",
        temperature: Annotated[float, Field(gt=0, description="of sampling")] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1, description="probability the kept tokens hold; 1 keeps all")] = 1.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest answer, in tokens")] = 512,
        batch_rows: Annotated[int, Field(ge=1, description="answers written together")] = 64,
        drop_unfinished: Annotated[bool, Field(description="leave out answers cut at max_new_tokens")] = False,
    ) -> None:
        if negatives > samples:
            raise UserError(f"{SLUG}: {negatives} negatives cannot be drawn from {samples} samples; raise samples.")
        self.samples, self.negatives, self.share, self.mode, self.encoder = samples, negatives, share, mode, encoder
        self.sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "batch_rows": batch_rows,
        }
        self.drop_unfinished = drop_unfinished

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows whose pool is large enough, with their negatives.

        Raises:
            UserError: a row has no prompt with one answer, or no row is left.
        """
        rows = [dataset[i] for i in range(len(dataset))]
        drawn = ctx.generate(rows, samples=self.samples, decoding="sample", **self.sampling)
        found, report = self.contrasted(dataset, drawn, ctx.seed, ctx.shop.loaded.model, ctx.processor)
        ctx.report(report)
        return found

    def contrasted(
        self, dataset: Dataset, drawn: Sequence[Sequence[Completion]], seed: int, model: Any, tokenizer: Any
    ) -> tuple[Dataset, dict[str, Any]]:
        """The rows with negatives from answers that are there, and what was found.

        Args:
            dataset: canonical rows.
            drawn: answers to each.
            seed: of the draw from the pool.
            model: for ``encoder: model``.
            tokenizer: of that model.
        """
        given = [given_answer(dataset[i]) for i in range(len(dataset))]
        # Space at the start is that of the template.
        texts = [[c.text.lstrip() for c in some if c.finished or not self.drop_unfinished] for some in drawn]
        flat = [text for some in texts for text in some]
        encoded = self.encode([*flat, *given], model, tokenizer)
        kept, columns, sizes, chosen, gone = [], [], [], [], []
        start = 0
        for index, (some, target) in enumerate(zip(texts, given, strict=True)):
            similar_n = cosine(encoded[start : start + len(some)], encoded[len(flat) + index])
            start += len(some)
            candidates = pool(some, similar_n, self.share, self.mode, target)
            sizes.append(len(candidates))
            if len(candidates) < self.negatives:
                continue
            picked = numpy_stream(seed, "data", SLUG, index).choice(candidates, self.negatives, replace=False).tolist()
            kept.append(index)
            columns.append({COLUMN: [as_answer(some[i], target) for i in picked]})
            chosen += [similar_n[i] for i in candidates]
            gone += [similar_n[i] for i in range(len(some)) if i not in candidates]
        report = {
            "prompts": len(given),
            "dropped": len(given) - len(kept),
            "mean_pool": float(np.mean(sizes)) if sizes else 0.0,
            "similarity_of_pool": float(np.mean(chosen)) if chosen else None,
            "similarity_of_rest": float(np.mean(gone)) if gone else None,
        }
        logger.info("%s: %s", SLUG, report)
        if not kept:
            raise UserError(
                f"{SLUG}: no prompt has {self.negatives} answers in its pool. Raise samples or share, or lower "
                "negatives.",
                where=place(dataset[0]) if len(dataset) else None,
            )
        return with_columns(dataset.select(kept), columns), report

    def encode(self, texts: list[str], model: Any, tokenizer: Any) -> np.ndarray:
        """Embeddings [n, H] of texts.

        Raises:
            UserError: the package of the encoder is not installed.
        """
        if self.encoder == "tfidf":
            from sklearn.feature_extraction.text import TfidfVectorizer

            return TfidfVectorizer(analyzer="char", ngram_range=(1, 3)).fit_transform(texts).toarray()
        if self.encoder == "model":
            return mean_states(texts, model, tokenizer)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise missing_extra("sentence-transformers", f"{SLUG}: encoder", "sentence-transformers") from None
        encoder = SentenceTransformer(self.encoder)
        longest = encoder.max_seq_length
        if longest and any(len(ids) > longest for ids in encoder.tokenizer(texts)["input_ids"]):
            warnings.warn(
                f"{SLUG}: some answers are longer than the encoder's {longest} tokens and are cut.", stacklevel=2
            )
        return np.asarray(encoder.encode(texts, convert_to_numpy=True), dtype=np.float64)


@torch.no_grad()
def mean_states(texts: Sequence[str], model: Any, tokenizer: Any) -> np.ndarray:
    """Mean over the tokens of the last hidden states of a model [n, H]."""
    found = []
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] or [0] for text in texts]
    device = next(model.parameters()).device
    for start in range(0, len(ids), ENCODED):
        part = ids[start : start + ENCODED]
        width = max(map(len, part))
        ids_BT = torch.zeros(len(part), width, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for b, row in enumerate(part):
            ids_BT[b, : len(row)], mask_BT[b, : len(row)] = torch.tensor(row), 1
        mask_BT = mask_BT.to(device)
        states = model.get_decoder()(input_ids=ids_BT.to(device), attention_mask=mask_BT).last_hidden_state.float()
        found.append((states * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True))
    return torch.cat(found).double().cpu().numpy()
