"""The task masked-lm: which tokens are hidden, what the head says of them, and a run from recipe to folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import luthier
from helpers import MASKING, PROCESSOR, make_session, random_rows, settings, tiny_bert, weights
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer
from luthier.lab.tokenizer import tokenizer
from luthier.runs.verify import verify_head
from luthier.tasks.masked_lm import SHARE, MaskedLM

MASK = MASKING.mask_token_id


def rows(*lengths, seed=0):
    """Rows of ordinary tokens between a first and a last special one."""
    rng = np.random.default_rng(seed)
    ids = [np.asarray([1, *rng.integers(4, 64, n), 2], dtype=np.int32) for n in lengths]
    return {"input_ids": ids, "key": [f"{i:032x}" for i in range(len(ids))]}


def collated(found, index=None):
    return MaskedLM(MASKING).collate(found, range(len(found["input_ids"])) if index is None else index)


def hidden_places(batch):
    """Row -> its hidden places and what stood there."""
    width = batch.inputs["input_ids"].shape[1]
    found = {int(row): {} for row in batch.row_B}
    for example, position, target in zip(batch.sequence_N, batch.position_N, batch.target_N, strict=True):
        found[int(batch.row_B[example])][int(position) % width] = int(target)
    return found


# -- which tokens are hidden


def test_a_share_of_the_ordinary_tokens_is_hidden_and_nothing_else_changes():
    found = rows(3, 10, 20, 27)
    batch = collated(found)
    ids_BT, mask_BT = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    for b, (ids, places) in enumerate(zip(found["input_ids"], hidden_places(batch).values(), strict=True)):
        assert len(places) == max(1, round(SHARE * (len(ids) - 2)))
        assert all(0 < t < len(ids) - 1 for t in places)
        assert {t: int(ids[t]) for t in places} == places
        shown = [MASK if t in places else int(i) for t, i in enumerate(ids)]
        assert ids_BT[b, : len(ids)].tolist() == shown
        assert ids_BT[b, len(ids) :].tolist() == [0] * (ids_BT.shape[1] - len(ids))
        assert mask_BT[b].sum() == len(ids)
        assert batch.adjustable_BT[b].tolist() == [0 < t < len(ids) - 1 for t in range(ids_BT.shape[1])]
    assert torch.equal(batch.supervised_BT, ids_BT == MASK)
    assert torch.equal(batch.weight_N, torch.ones(len(batch.target_N)))
    assert batch.keys_B == found["key"]


def test_evaluation_hides_the_same_tokens_whatever_stands_beside_a_row():
    found = rows(6, 12, 20)
    whole = hidden_places(collated(found))
    for i in range(3):
        alone = {k: [v[i]] for k, v in found.items()}
        assert hidden_places(collated(alone, [i]))[i] == whole[i]
    # By content and not by number: the same text elsewhere in the data hides the same.
    assert hidden_places(collated({k: [v[2]] for k, v in found.items()}, [77]))[77] == whole[2]


def test_training_hides_others_in_every_epoch_by_row_and_not_by_micro_batch():
    found, session = rows(20, 20, 20, 20), make_session(task="masked-lm")
    together = collated(found)
    session.epoch = 0
    first = hidden_places(session.task.vary(together, session))
    assert hidden_places(session.task.vary(together, session)) == first
    for i in range(4):
        alone = collated({k: [v[i]] for k, v in found.items()}, [i])
        session.step, session.micro = i, 1  # neither may matter
        assert hidden_places(session.task.vary(alone, session))[i] == first[i]
    session.epoch = 1
    second = hidden_places(session.task.vary(together, session))
    assert all(first[i].keys() != second[i].keys() for i in range(4))
    assert len({tuple(places) for places in first.values()}) > 1
    for epoch in (first, second):  # what stood there is what the data say, under earlier masks too
        assert all({t: int(found["input_ids"][i][t]) for t in p} == p for i, p in epoch.items())


def test_varied_rows_are_answered_from_no_cache():
    session = make_session(task="masked-lm")
    assert session.task.vary(collated(rows(9, 9)), session).keys_B is None


def test_a_row_of_special_tokens_alone_has_no_position():
    found = {"input_ids": [np.asarray([1, 2], dtype=np.int32)] * 2}
    batch = collated(found)
    assert len(batch.target_N) == 0
    assert torch.equal(batch.inputs["input_ids"], torch.tensor([[1, 2], [1, 2]]))
    session = make_session(task="masked-lm")
    assert float(session.loss(batch).sum.detach()) == 0.0


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(UserError, match="no mask token"):
        MaskedLM(PROCESSOR)


# -- what the head says of them

SIZE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
MARKS = {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
# Architecture -> what its configuration needs, and whether its logits are formed by the head.
KINDS = {
    "Bert": (SIZE, True),
    "Roberta": (SIZE, True),
    "XLMRoberta": (SIZE, True),
    "Camembert": (SIZE, True),
    "Electra": ({**SIZE, "embedding_size": 8}, True),
    "Deberta": (SIZE, True),
    "DebertaV2": ({**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, True),
    "DistilBert": (DISTIL, True),
    "ModernBert": ({**SIZE, **MARKS}, True),
    "Albert": ({**SIZE, "embedding_size": 8}, True),
    "MPNet": (SIZE, True),
    "Esm": ({**SIZE, "mask_token_id": MASK, "position_embedding_type": "rotary"}, False),
    "MobileBert": ({**SIZE, "embedding_size": 8, "intra_bottleneck_size": 16}, False),
}


def encoder(kind):
    """A tiny model in float64 whose biases are not zero, as those of a trained one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind][0])
    model = transformers.AutoModelForMaskedLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_log_probabilities_are_the_models_own(kind):
    model, batch = encoder(kind), collated(rows(5, 9, 14))
    task = MaskedLM(MASKING)
    encoded = task.encode(model, batch, hidden=True)
    assert (encoded.logits_NV is None) == KINDS[kind][1]
    own_NV = encoded.logits_NV
    if own_NV is None:
        own_NV = encoded.hidden_NH @ encoded.weight_VH.T + encoded.bias_V
    out = model(**batch.inputs, output_hidden_states=True)
    wanted_NV = out.logits.reshape(-1, 64)[batch.position_N]
    torch.testing.assert_close(own_NV.log_softmax(-1), wanted_NV.log_softmax(-1), atol=1e-12, rtol=0)
    body_BTH = model.base_model(**batch.inputs).last_hidden_state
    wanted_NH = body_BTH.reshape(-1, body_BTH.shape[-1])[batch.position_N]
    torch.testing.assert_close(encoded.layers(-1), wanted_NH, atol=1e-12, rtol=0)
    first_BTH = out.hidden_states[1]
    wanted_NH = first_BTH.reshape(-1, first_BTH.shape[-1])[batch.position_N]
    torch.testing.assert_close(encoded.layers(1), wanted_NH, atol=1e-12, rtol=0)
    assert not model._forward_hooks
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("kind", ["Bert", "Esm"])
def test_gradients_are_those_of_the_cross_entropy(kind):
    model, batch = encoder(kind).float(), collated(rows(5, 9, 14))
    session = make_session(model, task="masked-lm")
    session.loss(batch).sum.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    labels_BT = torch.full_like(batch.inputs["input_ids"], -100)
    labels_BT.view(-1)[batch.position_N] = batch.target_N
    (model(**batch.inputs, labels=labels_BT).loss * len(batch.target_N)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=2e-4, rtol=1e-4)


def test_finding_out_how_a_model_ends_leaves_dropout_as_it_was():
    found = []
    for asked in (False, True):
        session = make_session(tiny_bert(dropout=0.2), task="masked-lm")
        session.model.train()
        batch = collated(rows(9, 14))
        if asked:
            session.task.encode(session.model, batch)
        torch.manual_seed(3)
        found.append(session.loss(batch).sum.detach())
        assert session.model.training
    assert torch.equal(*found)


def test_the_start_up_check_knows_the_task():
    session = make_session(encoder("Bert").float(), task="masked-lm")
    assert verify_head(session) < 1e-5
    assert verify_head(make_session(encoder("Esm").float(), task="masked-lm")) < 1e-5
    layer = session.model.get_output_embeddings()
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 1.5  # what an unknown architecture might do
    with pytest.raises(UserError, match="does something after its output embedding"):
        verify_head(session)


# -- training


def test_accumulation_gives_one_trajectory():
    found = []
    for accumulation in (1, 4):
        session = make_session(task="masked-lm")
        sgd = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}
        Trainer(session, random_rows(), settings(epochs=2, accumulation=accumulation, **sgd)).run()
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=2e-5, rtol=1e-3)


def test_a_run_from_recipe_to_folder(tmp_path):
    words = tokenizer(64)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=64, **size)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    run = luthier.tune(
        model=str(tmp_path / "base"),  # its config names the task
        data={"train": ["lab:text?n=400", "lab:sentences?n=400"], "test": "lab:text?n=40"},
        training={"max_steps": 40, "batch_rows": 16, "learning_rate": 3e-3, "log_steps": 10},
        evaluation={"before": True, "limit": 40},
        output=str(tmp_path / "run"),
        seed=0,
        quiet=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["nll"] > lines[-1]["nll"]
    assert run.metrics["after"]["target"]["loss"]["value"] < run.metrics["before"]["target"]["loss"]["value"]
    # Beside the run: the loss of the saved model on the test rows, computed from its own logits.
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model").eval()
    ids = [
        np.asarray(words(row["text"])["input_ids"], dtype=np.int32)
        for row in luthier.lab.dataset("text", split="test", n=40)
    ]
    batch = MaskedLM(words).collate({"input_ids": ids}, range(len(ids)))
    with torch.no_grad():
        logits_BTV = model(**batch.inputs).logits
    logp_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])[batch.position_N].log_softmax(-1)
    wanted = -logp_NV.gather(1, batch.target_N[:, None]).mean()
    assert run.metrics["after"]["target"]["loss"]["value"] == pytest.approx(float(wanted), rel=1e-4)
