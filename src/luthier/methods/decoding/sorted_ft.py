"""Decoding with a sorted model: a chosen depth, a depth for each token, or drafting with a part of the model.

``static``: only blocks 1 to ``exit`` run; deeper ones are skipped and hold no keys and values.

``dynamic``: each token is tried at one exit after the other; it is written where the largest probability reaches the
exit's threshold, at the last exit always. With ``kv: propagate`` the keys and values of the skipped blocks are made
from the exit's hidden state, with ``recompute`` the skipped blocks run later; both only once a later token goes that
deep. The prompt's are always exact. ``target_agreement`` chooses the smallest threshold at which the first
``calibration_prompts`` prompts, written by the whole model, agree with it that often; no label is used.

``speculative``: the first ``exit`` blocks draft up to ``draft_length`` tokens and the other blocks verify them in one
pass, starting from the drafts' hidden states. Token t stands with probability ``min(1, p_full(t) / p_draft(t))``, the
next one after the first that falls comes from ``max(0, p_full - p_draft)``, normalised. The text is distributed exactly
as the whole model's; at temperature 0 it is the greedy text.

Dynamic and speculative decoding write one prompt at a time: each row has its own exits. Average depth, share of
accepted drafts and tokens per second of the last call are in ``report`` and in the log.

Paper: "Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference
(Using Sorted Fine-Tuning)", 2023, arXiv 2309.08968.

Example::

    decoding: {sorted-ft: {mode: dynamic, thresholds: 0.9}}
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.protocols import Completion, Context
from luthier.core.registry import decoder
from luthier.functional import early_exit, sequences
from luthier.functional.early_exit import Written
from luthier.functional.exits import (
    Blocks,
    blocks_of,
    check_exits,
    default_exits,
    fit_exits,
    transformers_model,
)

logger = logging.getLogger("luthier")


@decoder(
    "sorted-ft",
    example={"mode": "static", "exit": 1},
    tasks=("causal-lm",),
    paper="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language Models for Dynamic Inference "
    "(Using Sorted Fine-Tuning), 2023, arXiv 2309.08968",
)
class SortedDecoding:
    """Early exits: a chosen depth, a depth for each token, or self-speculation that writes the whole model's text."""

    def __init__(
        self,
        *,
        mode: Annotated[
            Literal["static", "dynamic", "speculative"],
            Field(description="one depth, a depth for each token, or draft with a part and verify with the whole"),
        ] = "static",
        exit: Annotated[
            int | None,
            Field(
                ge=1,
                description="static: blocks that run, by default all; speculative: blocks that draft, by "
                "default up to the first exit",
            ),
        ] = None,
        exits: Annotated[
            list[int] | None, Field(description="dynamic: exits to try; by default those the model was trained with")
        ] = None,
        thresholds: Annotated[
            Annotated[float, Field(ge=0, le=1)] | list[Annotated[float, Field(ge=0, le=1)]],
            Field(
                description="dynamic: largest probability from which a token is written; one, or one for each exit "
                "but the last"
            ),
        ] = 0.9,
        target_agreement: Annotated[
            float | None,
            Field(gt=0, le=1, description="dynamic: choose the thresholds for this agreement with the whole model"),
        ] = None,
        calibration: Annotated[
            Literal["one", "each"], Field(description="target_agreement: one threshold for all exits, or one for each")
        ] = "one",
        calibration_prompts: Annotated[
            int, Field(ge=1, description="target_agreement: prompts that the whole model writes first")
        ] = 16,
        kv: Annotated[
            Literal["propagate", "recompute"],
            Field(description="dynamic: keys of skipped blocks from the exit's state, or by running the blocks later"),
        ] = "propagate",
        draft_length: Annotated[int, Field(ge=1, description="speculative: most tokens drafted at a time")] = 4,
        draft_confidence: Annotated[
            float,
            Field(ge=0, le=1, description="speculative: stop drafting below this probability; changes only speed"),
        ] = 0.0,
        temperature: Annotated[float, Field(ge=0, description="0 writes the most likely token")] = 0.0,
        max_new_tokens: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 256,
        batch_rows: Annotated[int, Field(ge=1, description="static: prompts completed together")] = 32,
    ) -> None:
        if exits is not None:
            check_exits(exits)
        if target_agreement is not None and thresholds != 0.9:
            raise UserError("sorted-ft: target_agreement chooses the thresholds; remove one of the two.")
        if isinstance(thresholds, list) and exits is not None and len(thresholds) != len(exits) - 1:
            raise UserError(
                f"sorted-ft: {len(thresholds)} thresholds for {len(exits)} exits; the last exit needs none, so give "
                f"{len(exits) - 1}."
            )
        self.mode, self.exit, self.exits, self.thresholds = mode, exit, exits, thresholds
        self.target_agreement, self.calibration = target_agreement, calibration
        self.calibration_prompts, self.kv = calibration_prompts, kv
        self.draft_length, self.draft_confidence = draft_length, draft_confidence
        self.temperature, self.max_new_tokens, self.batch_rows = temperature, max_new_tokens, batch_rows
        self.report: dict[str, Any] = {}

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context) -> list[Completion]:
        """One completion per prompt of token ids, in order.

        Raises:
            UserError: a prompt has no token, an exit beyond the last block, or an architecture without exits.
        """
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise UserError(f"prompt {empty[0] + 1} has no token; give at least a beginning-of-text token.")
        depth = len(blocks_of(model))
        if self.exit is not None and self.exit > depth:
            raise UserError(f"sorted-ft: exit: {self.exit} lies beyond the last block; the model has {depth} blocks.")
        training = model.training
        model.eval()
        started = time.perf_counter()
        try:
            if self.mode == "static":
                found, about = self._static(model, prompts, ctx, depth)
            else:
                found, about = self._one_by_one(model, prompts, ctx, depth)
        finally:
            if training:
                model.train()
        seconds = time.perf_counter() - started
        tokens = sum(len(c.token_ids) for c in found)
        self.report = {"mode": self.mode, "tokens": tokens, "tokens_per_second": tokens / seconds, **about}
        logger.info("sorted-ft decoding: %s", self.report)
        return found

    def _static(
        self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context, depth: int
    ) -> tuple[list[Completion], dict[str, Any]]:
        shared = {"max_new_tokens": self.max_new_tokens, "batch_rows": self.batch_rows}
        if self.temperature:
            writer = registry.get("decoding", "sample").build({**shared, "temperature": self.temperature})
        else:
            writer = registry.get("decoding", "greedy").build(shared)
        with Blocks(model) as blocks:
            blocks.stop = self.exit or depth
            return writer.generate(model, prompts, ctx), {"mean_depth": float(blocks.stop)}

    def _one_by_one(
        self, model: Any, prompts: Sequence[Sequence[int]], ctx: Context, depth: int
    ) -> tuple[list[Completion], dict[str, Any]]:
        tokenizer, seeds = ctx.processor, ctx.rng("rollout")
        stop = sequences.stop_tokens(tokenizer.eos_token_id, model.generation_config.eos_token_id)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        exits = self._exits(model, depth)
        draft = self.exit or exits[0]
        if self.mode == "speculative" and draft >= depth:
            raise UserError(
                f"sorted-ft: exit: {draft} would draft with the whole model of {depth} blocks; choose 1 to {depth - 1}."
            )
        written: list[Written] = []
        with Blocks(model) as blocks:

            def shared(prompt: Sequence[int]) -> dict[str, Any]:
                room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(prompt))
                return {"prompt_1T": torch.tensor([list(prompt)], device=ctx.device), "most": room, "stop": stop}

            thresholds = self._thresholds(blocks, [shared(p) for p in prompts[: self.calibration_prompts]], exits)
            for given in map(shared, prompts):
                if given["most"] <= 0:
                    written.append(Written())
                elif self.mode == "dynamic":
                    written.append(
                        early_exit.dynamic(
                            blocks,
                            **given,
                            exits=exits,
                            thresholds=thresholds,
                            choose=lambda z_V: early_exit.draw(early_exit.distribution(z_V, self.temperature), seeds),
                            propagate=self.kv == "propagate",
                        )
                    )
                else:
                    written.append(
                        early_exit.speculative(
                            blocks,
                            **given,
                            exit=draft,
                            draft_length=self.draft_length,
                            draft_confidence=self.draft_confidence,
                            temperature=self.temperature,
                            generator=seeds,
                        )
                    )
        found = [
            Completion(
                text=tokenizer.decode(w.ids, skip_special_tokens=True),
                token_ids=tuple(w.ids),
                finished=bool(w.ids) and w.ids[-1] in stop,
            )
            for w in written
        ]
        if self.mode == "dynamic":
            depths = [d for w in written for d in w.depths]
            about = {"mean_depth": float(np.mean(depths)) if depths else float(depth), "thresholds": thresholds}
        else:
            drafted, passes = sum(w.drafted for w in written), sum(w.passes for w in written)
            accepted = sum(w.accepted for w in written)
            about = {
                "accepted_share": accepted / drafted if drafted else 0.0,
                "tokens_per_pass": (accepted + passes) / passes if passes else 0.0,
            }
        return found, about

    def _exits(self, model: Any, depth: int) -> tuple[int, ...]:
        trained = getattr(transformers_model(model).config, "sorted_exits", None)
        if self.mode == "dynamic" and not trained:
            warnings.warn(
                "this model's configuration does not say that it was trained with sorted-ft (an adapter cannot say "
                "it): how sure an untrained exit is means nothing.",
                stacklevel=4,
            )
        if self.exits is not None:
            return fit_exits(self.exits, depth)
        return tuple(trained) if trained else default_exits(depth)

    def _thresholds(self, blocks: Blocks, calibration: list[dict[str, Any]], exits: tuple[int, ...]) -> list[float]:
        """One threshold for each exit but the last."""
        count = len(exits) - 1
        if self.mode != "dynamic":
            return []
        if self.target_agreement is None or not count:
            given = self.thresholds if isinstance(self.thresholds, list) else [self.thresholds] * count
            if len(given) != count:
                raise UserError(
                    f"sorted-ft: {len(given)} thresholds for the exits {list(exits)}; the last needs none, so give "
                    f"{count}."
                )
            return [float(t) for t in given]
        seen: list[tuple[float, int]] = []
        for one in calibration:
            if one["most"] > 0:
                early_exit.dynamic(
                    blocks,
                    **one,
                    exits=exits,
                    thresholds=[2.0] * count,
                    choose=lambda z_V: int(z_V.argmax()),
                    propagate=False,
                    observe=lambda segment, confidence, top: seen.append((confidence, top)),
                )
        if not seen:
            raise UserError("sorted-ft: target_agreement: no prompt leaves room to write; shorten the prompts.")
        # Every exit was tried for every token, so the record is a table of tokens by exits.
        confidence = np.array([c for c, _ in seen]).reshape(-1, count + 1)
        top = np.array([t for _, t in seen]).reshape(-1, count + 1)
        agrees = top[:, :-1] == top[:, -1:]
        return early_exit.calibrate(confidence[:, :-1], agrees, self.target_agreement, each=self.calibration == "each")
