"""The suites against numpy over all positions at once, sklearn's F1, and entities marked by hand."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Batch, Completion
from luthier.evaluation import suite
from luthier.evaluation.accumulators import entities, is_entity_scheme

BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def batch(logits_NV: torch.Tensor, target_N: torch.Tensor, sequence_N: torch.Tensor, first: int = 0) -> Batch:
    return Batch(
        inputs={"logits": logits_NV},
        position_N=torch.arange(len(target_N)),
        target_N=target_N,
        weight_N=torch.ones(len(target_N)),
        sequence_N=sequence_N,
        row_B=torch.arange(int(sequence_N.max()) + 1) + first,
    )


def forward(given: Batch) -> Any:
    logp_NV = given.inputs["logits"].log_softmax(dim=-1)
    top = logp_NV.max(dim=-1)
    return SimpleNamespace(
        logp_N=logp_NV.gather(1, given.target_N[:, None]).squeeze(1),
        top1_N=top.indices,
        top1_logp_N=top.values,
        collision_N=(2 * logp_NV).exp().sum(dim=-1),
    )


def random_batches(count: int, classes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        sizes = torch.randint(1, 8, (4,), generator=generator)
        sequence_N = torch.arange(4).repeat_interleave(sizes)
        n = len(sequence_N)
        target_N = torch.randint(classes, (n,), generator=generator)
        logits_NV = torch.randn(n, classes, generator=generator) + torch.nn.functional.one_hot(target_N, classes)
        made.append(batch(logits_NV, target_N, sequence_N, first=4 * index))
    return made


def together(batches: list[Batch]) -> tuple[np.ndarray, np.ndarray]:
    logits = torch.cat([b.inputs["logits"] for b in batches]).double()
    return logits.softmax(-1).numpy(), torch.cat([b.target_N for b in batches]).numpy()


def test_causal_lm_metrics() -> None:
    batches = random_batches(30, 11)
    p, y = together(batches)
    own = p[np.arange(len(y)), y]
    found = suite.likelihood(batches, forward, task="causal-lm")
    expected = {
        "loss": -np.log(own).mean(),
        "nll": -np.log(own).mean(),
        "perplexity": math.exp(-np.log(own).mean()),
        "token_accuracy": (p.argmax(1) == y).mean(),
        "mean_probability": own.mean(),
        "brier": ((p - np.eye(11)[y]) ** 2).sum(1).mean(),
    }
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-5), name
        assert found[name]["low"] < value < found[name]["high"], name
        assert found[name]["n"] == len(y)
    assert set(found) == {*expected, "ece_equal_mass", "ece_equal_width"}
    assert set(found) & set(suite.CALIBRATION) == set(suite.CALIBRATION)
    assert {found[n]["direction"] for n in ("loss", "perplexity", "brier", "ece_equal_mass")} == {"lower"}
    assert {found[n]["direction"] for n in ("token_accuracy", "mean_probability")} == {"higher"}
    assert math.log(found["perplexity"]["high"]) == pytest.approx(found["loss"]["high"])
    json.dumps(found, allow_nan=False)


def test_the_result_does_not_depend_on_the_batches() -> None:
    batches = random_batches(12, 5)
    merged = batch(
        torch.cat([b.inputs["logits"] for b in batches]),
        torch.cat([b.target_N for b in batches]),
        torch.cat([b.sequence_N + 4 * i for i, b in enumerate(batches)]),
    )
    apart, at_once = (suite.likelihood(x, forward, task="causal-lm") for x in (batches, [merged]))
    for name in apart:
        for key in ("value", "low", "high", "n"):
            assert apart[name][key] == pytest.approx(at_once[name][key], rel=1e-9), (name, key)


def test_calibration_can_be_left_out() -> None:
    found = suite.likelihood(random_batches(2, 5), forward, task="causal-lm", calibration=False)
    assert not set(found) & set(suite.CALIBRATION)


def test_positions_of_weight_zero_do_not_count() -> None:
    given = random_batches(1, 5)[0]
    kept = torch.arange(len(given.target_N)) % 2 == 0
    masked = given.with_weights(kept.float())
    masked_found = suite.likelihood([masked], forward, task="causal-lm")
    p, y = together([given])
    expected = -np.log(p[np.arange(len(y)), y])[kept.numpy()]
    assert masked_found["loss"]["value"] == pytest.approx(expected.mean(), rel=1e-5)
    assert masked_found["loss"]["n"] == int(kept.sum())


def test_classification_f1_by_sklearn() -> None:
    batches = random_batches(20, 5)
    p, y = together(batches)
    found = suite.likelihood(batches, forward, task="sequence-classification", labels=list("abcde"))
    top = p.argmax(1)
    assert found["f1_macro"]["value"] == pytest.approx(f1_score(y, top, average="macro"))
    assert found["f1_micro"]["value"] == pytest.approx(f1_score(y, top, average="micro"))
    assert found["f1_micro"]["value"] == pytest.approx(found["accuracy"]["value"])
    assert found["matthews"]["value"] == pytest.approx(matthews_corrcoef(y, top))
    assert found["matthews"]["low"] < found["matthews"]["value"] < found["matthews"]["high"]
    assert found["f1_macro"]["low"] < found["f1_macro"]["value"] < found["f1_macro"]["high"]
    assert "perplexity" not in found


def test_macro_f1_leaves_out_classes_never_met() -> None:
    logits = torch.eye(4)[[0, 1, 1]] * 9
    given = batch(logits, torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    found = suite.likelihood([given], forward, task="image-classification", labels=list("abcd"))
    assert found["f1_macro"]["value"] == pytest.approx(f1_score([0, 1, 0], [0, 1, 1], average="macro"))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {("PER", 0, 1), ("LOC", 3, 3)}),
        ("B-PER B-PER", {("PER", 0, 0), ("PER", 1, 1)}),
        ("I-PER I-PER", {("PER", 0, 1)}),
        ("O I-LOC I-PER", {("LOC", 1, 1), ("PER", 2, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("B-X I-X E-X S-X S-X", {("X", 0, 2), ("X", 3, 3), ("X", 4, 4)}),
        ("E-X I-X", {("X", 0, 0), ("X", 1, 1)}),
        ("B-a-b I-a-b", {("a-b", 0, 1)}),
        ("", set()),
    ],
)
def test_entities(tags: str, expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_entity_schemes() -> None:
    assert is_entity_scheme(BIO)
    assert not is_entity_scheme(["NOUN", "VERB"])
    assert not is_entity_scheme(["O"])
    assert not is_entity_scheme(["B-PER", "PERSON"])


def test_entity_f1_by_hand() -> None:
    true = ["B-PER I-PER O B-LOC", "O B-LOC", "O O"]
    said = ["B-PER I-PER O B-PER", "O B-LOC", "B-LOC O"]  # found: PER, LOC; wrong type; one too many
    tags = {tag: index for index, tag in enumerate(BIO)}
    targets = [torch.tensor([tags[t] for t in line.split()]) for line in true]
    guesses = [torch.tensor([tags[t] for t in line.split()]) for line in said]
    sequence_N = torch.arange(3).repeat_interleave(torch.tensor([len(t) for t in targets]))
    given = batch(torch.eye(5)[torch.cat(guesses)] * 9, torch.cat(targets), sequence_N)
    found = suite.likelihood([given], forward, task="token-classification", labels=BIO)
    assert found["entity_precision"]["value"] == pytest.approx(2 / 4)
    assert found["entity_recall"]["value"] == pytest.approx(2 / 3)
    assert found["entity_f1"]["value"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    assert found["entity_f1"]["n"] == 3


def test_part_of_speech_tags_have_no_entities() -> None:
    found = suite.likelihood(random_batches(3, 2), forward, task="token-classification", labels=["NOUN", "VERB"])
    assert "entity_f1" not in found
    assert "f1_macro" in found


def test_memory_does_not_grow_with_the_data() -> None:
    def stream(count: int) -> Iterator[Batch]:
        made = random_batches(1, 50)[0]
        for _ in range(count):
            yield made

    def peak(count: int) -> int:
        tracemalloc.start()
        suite.likelihood(stream(count), forward, task="causal-lm")
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(2)
    assert peak(300) < peak(20) + 200_000  # from 50 examples on, every jackknife group is filled


def test_refusals() -> None:
    with pytest.raises(UserError, match="no supervised position"):
        suite.likelihood([], forward, task="causal-lm")
    with pytest.raises(UserError, match="names of the labels"):
        suite.likelihood(random_batches(1, 3), forward, task="sequence-classification")
    broken = random_batches(3, 4)[2]
    broken.inputs["logits"][-1] = torch.nan
    with pytest.raises(LuthierError, match="not finite on row 11"):
        suite.likelihood([broken], forward, task="causal-lm")


def test_one_sequence_has_no_interval() -> None:
    given = batch(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.long))
    found = suite.likelihood([given], forward, task="causal-lm")
    assert found["loss"]["low"] is None
    assert found["ece_equal_mass"]["high"] is None
    json.dumps(found, allow_nan=False)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"row": 10 + i, "completion": str(i)} for i in range(count)]


def test_generation() -> None:
    seen: list[Any] = []

    def generate(prompts: list[list[int]]) -> list[Completion]:
        seen.extend(prompts)
        return [Completion(str(p[0] if p[0] != 2 else 99), (7,) * (p[0] + 1), p[0] != 3) for p in prompts]

    def verifier(given: Any, completions: Any, ctx: Any) -> list[float | None]:
        return [
            None if r["completion"] == "4" else float(r["completion"] == c)
            for r, c in zip(given, completions, strict=True)
        ]

    found = suite.generation(rows(5), [(i,) for i in range(5)], generate, verifier, name="exact_match")
    assert seen == [[0], [1], [2], [3], [4]]
    metrics = found["metrics"]
    assert (metrics["exact_match"]["value"], metrics["exact_match"]["n"]) == (0.75, 4)
    assert metrics["judged"]["value"] == 0.8
    assert metrics["finished"]["value"] == 0.8
    assert (metrics["tokens"]["value"], metrics["tokens"]["unit"]) == (3.0, "tokens")
    assert [i["score"] for i in found["items"]] == [1.0, 1.0, 0.0, 1.0, None]
    assert [i["row"] for i in found["items"]] == [10, 11, 12, 13, 14]
    json.dumps(found, allow_nan=False)


def test_generation_refusals() -> None:
    with pytest.raises(UserError, match="no row to generate"):
        suite.generation([], [], lambda p: [], lambda r, c, x: [])
    with pytest.raises(LuthierError, match="0 completions for 1 prompts"):
        suite.generation(rows(1), [[1]], lambda p: [], lambda r, c, x: [])
    one = Completion("x", (1,), True)
    with pytest.raises(LuthierError, match="2 scores for 1 completions"):
        suite.generation(rows(1), [[1]], lambda p: [one], lambda r, c, x: [1.0, 1.0])


def test_items_are_compared_in_pairs() -> None:
    before = [{"row": i, "score": s} for i, s in enumerate([0.0, 0.0, 1.0, None] * 20)]
    after = [{"row": i, "score": s} for i, s in enumerate([1.0, 0.0, 1.0, 1.0] * 20)]
    change = suite.compare_items(before, after)
    assert (change["value"], change["n"]) == (pytest.approx(1 / 3), 60)
    assert 0 < change["low"] < 1 / 3 < change["high"]
    assert change["p_value"] <= 0.01
    with pytest.raises(LuthierError, match="same rows"):
        suite.compare_items(before, after[::-1])
