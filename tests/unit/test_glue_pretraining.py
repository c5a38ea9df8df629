"""Replaced-token detection and sentence contrast in the engine, against values worked out beside it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import two_processes
from helpers import MASKING, make_session, random_rows, settings, tiny_bert, weights
from luthier.core.errors import UserError
from luthier.core.rng import stream
from luthier.engine.distributed import Processes
from luthier.engine.loop import Trainer
from luthier.functional.generator_pair import join, narrow, shallow
from luthier.functional.replaced_tokens import DisentangledEmbedding, put
from luthier.methods.objectives import glue_pretraining as subject
from luthier.methods.objectives.glue_pretraining import GluePretraining
from luthier.recipe.load import load
from luthier.recipe.plan import plan

SGD = {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant"}
ALONE = {"contrast_weight": 0.0}


def session_with(model=None, **options):
    return make_session(model or tiny_bert(), task="masked-lm", objective=GluePretraining(**options))


def a_step(session, count=5):
    """One micro-batch that is the whole step."""
    batch = session.task.collate(random_rows(count).fetch(range(count)), range(count))
    session.totals = {
        "token": float(len(batch.target_N)),
        "sequence": float(count),
        "adjustable": float(batch.adjustable_BT.sum()),
    }
    return batch


def run(model=None, processes=None, rows=24, finish=True, options=None, **values):
    objective = GluePretraining(**(options or {}))
    session = make_session(model or tiny_bert(), task="masked-lm", objective=objective, processes=processes)
    records = []
    trainer = Trainer(
        session,
        random_rows(rows),
        settings(**{"epochs": 2, **SGD, **values}),
        observe=lambda event, record: records.append(record) if event == "step" else None,
    )
    trainer.run()
    if finish:
        session.stack.call("finish_model", session.model, MASKING)
    return session.model, records


# -- the loss


def mlm_by_hand(base, batch):
    """A first block with the model's own head as generator: logits [N, V] at the hidden tokens, in float64."""
    small = copy.deepcopy(base)
    small.bert.encoder.layer = small.bert.encoder.layer[:1]
    with torch.no_grad():
        return small(**batch.inputs).logits.reshape(-1, 64)[batch.position_N].double()


@pytest.mark.parametrize("embeddings", ["none", "shared", "gdes"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_loss_of_the_first_step_is_the_formula(embeddings, pooling):
    base = tiny_bert().eval()
    session = session_with(embeddings=embeddings, pooling=pooling, temperature=0.5, contrast_weight=3.0)
    session.model.eval()
    batch = a_step(session)
    loss = session.loss(batch)
    hidden = len(batch.target_N)
    # The generator, and what it writes: the first token whose cumulative probability exceeds a number of the row's.
    logits_NV = mlm_by_hand(base, batch).numpy()
    p_NV = np.exp(logits_NV - logits_NV.max(1, keepdims=True))
    p_NV /= p_NV.sum(1, keepdims=True)
    mlm = -np.log(p_NV[np.arange(hidden), batch.target_N.numpy()]).mean()
    ids_BT = put(batch.inputs["input_ids"], batch.position_N, batch.target_N).numpy()
    mixed_BT, place = ids_BT.copy(), 0
    p_NV[:, MASKING.mask_token_id] = 0  # the mask itself is never written
    p_NV /= p_NV.sum(1, keepdims=True)
    for row in range(5):
        count = int((batch.sequence_N == row).sum())
        generator = stream(session.seed, "noise", "glue-pretraining", 0, row)
        for level in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
            running, token = 0.0, 0
            while running + p_NV[place, token] <= level:
                running, token = running + p_NV[place, token], token + 1
            mixed_BT.flat[int(batch.position_N[place])] = token
            place += 1
    # The encoder: the whole body, on the text as the generator left it, and twice on the text as it is.
    mask_BT = batch.inputs["attention_mask"]
    with torch.no_grad():
        body = lambda ids: base.bert(input_ids=torch.from_numpy(ids), attention_mask=mask_BT).last_hidden_state  # noqa: E731
        logit_BT = session.model.detection_head(body(mixed_BT)).squeeze(-1).double().numpy()
        h_BTH = body(ids_BT)
        mean_BH = torch.stack([h[: int(m.sum())].mean(0) for h, m in zip(h_BTH, mask_BT, strict=True)])
        v_BD = session.model.contrast_head(mean_BH if pooling == "mean" else h_BTH[:, 0]).double().numpy()
    told_BT = batch.adjustable_BT.numpy()
    sign_BT = np.where(mixed_BT != ids_BT, 1.0, -1.0)
    rtd = np.log1p(np.exp(-sign_BT * logit_BT))[told_BT].mean()
    unit_BD = v_BD / np.linalg.norm(v_BD, axis=1, keepdims=True)
    logits_BB = unit_BD @ unit_BD.T / 0.5
    contrast = (np.log(np.exp(logits_BB).sum(1)) - np.diag(logits_BB)).mean()
    assert float(loss.sum.detach() / loss.weight) == pytest.approx(mlm + 50 * rtd + 3 * contrast, rel=1e-5)
    total, count = loss.metrics["detection_loss"]
    assert float(total / count) == pytest.approx(rtd, rel=1e-5)
    total, count = loss.metrics["replaced"]
    assert float(total / count) == pytest.approx((sign_BT[told_BT] > 0).mean())
    total, count = loss.metrics["contrast_loss"]
    assert float(total / count) == pytest.approx(contrast, rel=1e-5)


def test_the_encoder_sees_no_mask_and_the_generator_no_replacement():
    session = session_with(**ALONE)
    seen = {}
    for part in ("generator", "encoder"):
        session.model.bert.get_submodule(part).register_forward_pre_hook(
            lambda module, args, part=part: seen.update({part: args[0]})
        )
    batch = a_step(session)
    session.task.encode(session.model, batch)  # the question how the model ends
    session.loss(batch)
    assert torch.equal(seen["generator"], batch.inputs["input_ids"])
    assert not (seen["encoder"][batch.supervised_BT] == MASKING.mask_token_id).any()
    original_BT = put(batch.inputs["input_ids"], batch.position_N, batch.target_N)
    elsewhere_BT = ~batch.supervised_BT
    assert torch.equal(seen["encoder"][elsewhere_BT], original_BT[elsewhere_BT])
    assert (seen["encoder"] != original_BT).any()


def test_the_mask_is_never_written_even_by_a_generator_that_is_sure_of_it():
    session = session_with(**ALONE)
    with torch.no_grad():
        session.model.get_output_embeddings().bias[MASKING.mask_token_id] = 50.0
    seen = []
    session.model.bert.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = a_step(session)
    session.loss(batch)
    assert not (seen[-1][batch.supervised_BT] == MASKING.mask_token_id).any()


def test_detection_teaches_the_generator_nothing_but_through_a_shared_table():
    def table_gradient(embeddings, weight):
        session = session_with(embeddings=embeddings, detection_weight=weight, **ALONE)
        session.loss(a_step(session)).sum.backward()
        blocks = [p.grad for p in session.model.bert.generator.encoder.parameters()]
        return session.model.bert.generator.get_input_embeddings().weight.grad, blocks

    for embeddings, same in (("none", True), ("gdes", True), ("shared", False)):
        small, small_blocks = table_gradient(embeddings, 1e-6)
        large, large_blocks = table_gradient(embeddings, 50.0)
        assert all(torch.equal(a, b) for a, b in zip(small_blocks, large_blocks, strict=True))
        assert torch.equal(small, large) is same, embeddings


def test_the_two_passes_of_a_sentence_have_dropout_masks_of_their_own(monkeypatch):
    seen = []
    original = subject.contrast_logits
    monkeypatch.setattr(subject, "contrast_logits", lambda *given: seen.append(given) or original(*given))
    session = session_with(tiny_bert(dropout=0.1))
    session.model.train()
    session.loss(a_step(session))
    first_BD, second_BD, _ = seen[0]
    assert not torch.isclose(first_BD, second_BD).all(dim=-1).any()
    torch.testing.assert_close(first_BD, second_BD, atol=0.5, rtol=0)


# -- training


@pytest.mark.parametrize(
    "options",
    [{"embeddings": "none"}, {"embeddings": "shared"}, {"generator": "narrow"}, {"generator_share": 0.7, "seed": 3}],
)
def test_accumulation_gives_one_trajectory(options):
    one, _ = run(options={**ALONE, **options})
    four, _ = run(options={**ALONE, **options}, accumulation=4)
    assert weights(one).keys() == weights(tiny_bert()).keys()  # generator and head are gone
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(four)[name], atol=2e-5, rtol=1e-3)


def test_the_contrast_alone_needs_no_generator_and_learns():
    model, records = run(
        tiny_bert(dropout=0.1),
        options={"detection_weight": 0.0, "contrast_weight": 1.0},
        optimizer="adamw",
        learning_rate=3e-3,
        epochs=8,
    )
    assert weights(model).keys() == weights(tiny_bert()).keys()
    losses = [record["contrast_loss"] for record in records]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert "detection_loss" not in records[-1]


def test_a_row_left_over_is_not_contrasted():
    _, records = run(tiny_bert(dropout=0.1), rows=9, epochs=1, batch_rows=8)
    assert [record.get("contrast_loss", 0.0) > 0 for record in records] == [True, False]
    assert all(record["detection_loss"] > 0 for record in records)


def test_the_generator_is_the_smaller():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    base = tiny_bert()
    first, thin = shallow(base.bert, 1, who="x"), narrow(base.bert, 0.5, who="x")
    assert len(first.encoder.layer) == 1
    assert first.config.num_hidden_layers == 1
    assert base.config.num_hidden_layers == 3
    assert torch.equal(first.encoder.layer[0].output.dense.weight, base.bert.encoder.layer[0].output.dense.weight)
    assert thin.body.config.hidden_size == 8
    assert thin.body.config.num_attention_heads == 1
    assert count(thin.body.encoder) < count(base.bert.encoder) / 2


# -- what is saved


@pytest.mark.parametrize("generator", ["shallow", "narrow"])
def test_the_export_with_both_tables_added_is_the_shared_computation(generator, tmp_path):
    model, _ = run(options={**ALONE, "generator": generator}, finish=False)
    model.eval()
    ids_BT = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    table_VH = model.bert.get_input_embeddings().weight.detach()
    delta_VH = model.bert.encoder.get_input_embeddings().delta.detach()
    assert delta_VH.abs().max() > 0
    sum_VH = (table_VH + delta_VH).clone()
    with torch.no_grad():
        with model.bert.encoding():
            wanted = model.bert(input_ids=ids_BT).last_hidden_state
        GluePretraining(**ALONE, generator=generator).finish_model(model, MASKING)
        assert torch.equal(model.bert(input_ids=ids_BT).last_hidden_state, wanted)
    assert torch.equal(model.get_input_embeddings().weight, sum_VH)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        for found in (opened, classifier):
            torch.testing.assert_close(found.bert(input_ids=ids_BT).last_hidden_state, wanted, atol=1e-6, rtol=0)


def test_untied_output_embeddings_stay_untied():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**{**tiny_bert().config.to_dict(), **UNTIED}))
    output = model.get_output_embeddings().weight
    made, _ = run(model, options=ALONE, max_steps=1)
    assert made.get_output_embeddings().weight is output
    assert made.get_output_embeddings().weight is not made.get_input_embeddings().weight


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize("kind", ["Roberta", "Electra", "DebertaV2", "DistilBert", "ModernBert", "Esm"])
def test_other_encoders_take_their_steps(kind):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    marks = {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    special = {
        "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        "ModernBert": {**size, **marks},
        "Esm": {**size, "mask_token_id": 3, "position_embedding_type": "rotary"},
        "DebertaV2": {**size, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, pad_token_id=0, **special.get(kind, size))
    model = transformers.AutoModelForMaskedLM.from_config(config)
    names = weights(model).keys()
    for generator in ("shallow", "narrow"):
        made, records = run(copy.deepcopy(model), options={"generator": generator, "contrast_weight": 0.0}, max_steps=2)
        assert weights(made).keys() == names
        assert all(np.isfinite(record["loss"]) and record["detection_loss"] > 0 for record in records)


# -- refusals


def test_models_without_dropout_and_batches_of_one_row_are_refused_for_the_contrast():
    with pytest.raises(UserError, match=r"every dropout rate of the model is 0.*contrast_weight: 0"):
        run()
    with pytest.raises(UserError, match="a micro-batch of one row has no other sentence"):
        run(tiny_bert(dropout=0.1), batch_rows=1)


def test_frozen_parts_are_refused():
    class Half:
        def apply(self, model, ctx):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("layer.0" not in name)
            return model

        def groups(self, model):
            return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    session = make_session(task="masked-lm", objective=GluePretraining(**ALONE), parameters=[Half()])
    with pytest.raises(UserError, match=r"leave 16 tensors of its generator and heads frozen.*parameters: \[full\]"):
        Trainer(session, random_rows(), settings())


def test_decoders_are_refused():
    config = transformers.BertConfig(**{**tiny_bert().config.to_dict(), "is_decoder": True})
    with pytest.raises(UserError, match="BertForMaskedLM is no encoder: a decoder sees only what stands before"):
        GluePretraining().prepare_model(transformers.BertForMaskedLM(config), MASKING)


def test_encoders_that_share_one_block_need_the_other_generator():
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(vocab_size=64, embedding_size=16, **size))
    with pytest.raises(UserError, match=r"AlbertModel shares one between its layers\. Choose generator: narrow"):
        GluePretraining().prepare_model(model, MASKING)


def test_embeddings_that_scale_are_refused_for_gdes():
    class Scaled(torch.nn.Embedding):
        pass

    model = tiny_bert()
    model.bert.set_input_embeddings(Scaled(64, 16))
    with pytest.raises(UserError, match=r"gdes: Scaled does more than look up.*embeddings: shared"):
        join(model, shallow(model.bert, 1, who="x"), "gdes", who="x")
    pair = join(model, shallow(model.bert, 1, who="x"), "shared", who="x")
    assert pair.encoder.get_input_embeddings() is pair.generator.get_input_embeddings()
    assert not isinstance(pair.encoder.get_input_embeddings(), DisentangledEmbedding)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "lab:nano"}, "a decoder sees only what stands before a token"),
        ({"parameters": ["lora"]}, "trained in full and taken off at the end"),
        ({"training": {"sharding": "fsdp2"}}, "share one table of embeddings"),
    ],
)
def test_recipes_that_cannot_work_are_refused_with_the_reason(change, reason):
    recipe = {
        "model": {"id": "some-encoder", "task": "masked-lm"},
        "data": {"train": "lab:text"},
        "objective": "glue-pretraining",
        "output": "runs/x",
        **change,
    }
    with pytest.raises(UserError, match=reason):
        plan(load(recipe))


# -- two processes

# 19 rows leave one process without a row in an epoch's last step.
SIZES = {"rows": 19, "batch_rows": 6}
# Name -> options of the method, and the rate of dropout.
JOBS = {"detection": (ALONE, 0.0), "both": ({}, 0.1)}


def main(folder):
    torch.set_num_threads(1)
    processes = Processes("ddp", device="cpu")
    for name, (options, dropout) in JOBS.items():
        model, _ = run(tiny_bert(dropout=dropout), processes, options=options, **SIZES)
        found = {n: p.contiguous() for n, p in weights(model).items()}
        save_file(found, Path(folder) / f"{name}-{processes.rank}.safetensors")
    two_processes.leave()


@pytest.mark.distributed
def test_two_processes_give_the_trajectory_of_one(tmp_path):
    two_processes.launch(__file__, [str(tmp_path)], timeout=240)
    for name, (options, dropout) in JOBS.items():
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        # With dropout each process draws masks of its own, so that only the processes agree.
        alone = first if dropout else weights(run(options=options, **SIZES)[0])
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)
            torch.testing.assert_close(value, alone[key], atol=2e-5, rtol=1e-3)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
