"""A start-up check that the log-prob head computes what the model itself computes."""

from __future__ import annotations

import torch

from luthier.core.errors import UserError
from luthier.core.protocols import Batch
from luthier.engine.session import Session
from luthier.tasks.causal_lm import underlying

PROBE_ROWS, PROBE_TOKENS = 2, 8
TOLERANCE_FP32, TOLERANCE_BF16 = 1e-3, 0.1


@torch.no_grad()
def verify_head(session: Session) -> float:
    """Largest difference between the head's log-probabilities and those of the model's own forward pass, in nats.

    An architecture that does something unknown after its output embedding is refused here, before training. Of a masked
    language model every token is predicted where it stands, of a causal one where the token before it stands.

    Raises:
        UserError: the difference exceeds the tolerance of the precision.
    """
    model, base = session.model, underlying(session.model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    rows, tokens = PROBE_ROWS, PROBE_TOKENS
    ids_BT = (torch.arange(rows * tokens, device=session.device).reshape(rows, tokens) * 7919) % vocabulary
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    back = 0 if session.task.name == "masked-lm" else 1
    example_N = torch.arange(rows, device=session.device).repeat_interleave(tokens - back)
    token_N = torch.arange(back, tokens, device=session.device).repeat(rows)
    batch = Batch(
        inputs=inputs,
        position_N=example_N * tokens + token_N - back,
        target_N=ids_BT[example_N, token_N],
        weight_N=torch.ones(len(token_N), device=session.device),
        sequence_N=example_N,
        row_B=torch.arange(rows, device=session.device),
    )
    was_training = model.training
    model.eval()
    try:
        with session.autocast():
            # Virtual tokens of prompt tuning stand in front of the probe's.
            logits_BTV = model(**inputs, **({"use_cache": False} if back else {})).logits[:, -tokens:].float()
        own_N = session.forward(batch, grad=False).logp_N
    finally:
        model.train(was_training)
    predicting_BTV = logits_BTV[:, : tokens - back].log_softmax(-1)
    wanted_N = predicting_BTV.gather(-1, ids_BT[:, back:, None]).reshape(-1)
    worst = float((own_N - wanted_N).abs().max())
    low = session.precision == "bf16" or next(base.parameters()).dtype != torch.float32
    if not worst <= (TOLERANCE_BF16 if low else TOLERANCE_FP32):
        raise UserError(
            f"{type(base).__name__} does something after its output embedding that the log-prob head does not know "
            f"(log-probabilities differ by {worst:.3g} nats); this architecture is not supported."
        )
    return worst
