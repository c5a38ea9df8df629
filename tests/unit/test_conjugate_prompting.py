"""Conjugate prompting: references by hand, transforms there and back, the four cells, decoder and diagnosis."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from luthier.core.errors import UserError
from luthier.core.registry import get
from luthier.functional.ambiguity import LANGUAGES, starts_with, suite
from luthier.functional.conjugation import (
    BUILT_IN,
    composed,
    conjugation,
    recovery,
    round_trip_failures,
    with_answers,
)
from luthier.functional.in_context_regression import Prior, Regressor, estimated_gate, posterior, prompts

SLUG = "conjugate-prompting"
TWO = Prior(np.array([[1.0], [-1.0]]))


def test_references_of_one_pair_by_hand():
    found = posterior([[2.0]], [1.0], TWO)
    p_d = (math.exp(-0.5) + math.exp(-4.5)) / 2 / math.sqrt(2 * math.pi)
    p_c = math.exp(-0.1) / math.sqrt(10 * math.pi)
    g = p_d / (p_d + p_c)
    assert found.continuous[0] == pytest.approx(0.4, abs=1e-14)
    assert found.discrete[0] == pytest.approx(math.tanh(2), abs=1e-14)
    assert found.log_p_discrete == pytest.approx(math.log(p_d), abs=1e-13)
    assert found.log_p_continuous == pytest.approx(math.log(p_c), abs=1e-13)
    assert found.gate == pytest.approx(g, abs=1e-13)
    assert found.mixture[0] == pytest.approx(g * math.tanh(2) + (1 - g) * 0.4, abs=1e-13)


def test_references_against_another_computation():
    rng = np.random.default_rng(3)
    prior = Prior(rng.normal(size=(5, 3)), sigma=0.7, tau=1.6, alpha=0.3)
    x, y = rng.normal(size=(4, 3)), rng.normal(size=4)
    each = [norm.pdf(y, x @ w, 0.7).prod() for w in prior.tasks_nD]
    p_d = np.mean(each)
    p_c = multivariate_normal.pdf(y, np.zeros(4), 1.6**2 * x @ x.T + 0.49 * np.eye(4))
    w_c = 1.6**2 * x.T @ np.linalg.inv(1.6**2 * x @ x.T + 0.49 * np.eye(4)) @ y
    found = posterior(x, y, prior)
    np.testing.assert_allclose(found.continuous, w_c, atol=1e-12)
    np.testing.assert_allclose(found.discrete, np.average(prior.tasks_nD, axis=0, weights=each), atol=1e-12)
    assert found.gate == pytest.approx(0.3 * p_d / (0.3 * p_d + 0.7 * p_c), abs=1e-12)


def test_references_at_the_edges():
    prior = Prior(np.array([[1.0, 0.0], [3.0, 2.0]]), alpha=0.25)
    empty = posterior(np.zeros((0, 2)), [], prior)
    assert empty.continuous.tolist() == [0, 0]
    assert empty.discrete.tolist() == [2, 1]
    assert empty.gate == pytest.approx(0.25, abs=1e-15)
    assert (empty.log_p_discrete, empty.log_p_continuous) == (0.0, 0.0)
    # Labels far away: every density underflows, and one task dominates.
    far = posterior([[100.0, 0.0]] * 2, [300.0] * 2, prior)
    np.testing.assert_allclose(far.discrete, [3, 2], atol=1e-12)
    assert math.isfinite(far.log_p_discrete)
    x, y = [[1.0, 2.0]], [0.5]
    for alpha, name in ((0.0, "continuous"), (1.0, "discrete")):
        found = posterior(x, y, Prior(prior.tasks_nD, alpha=alpha))
        assert found.gate == alpha
        assert found.mixture.tolist() == getattr(found, name).tolist()


def test_the_mixture_predicts_best_on_mixed_prompts():
    rng = np.random.default_rng(0)
    prior = Prior(rng.normal(size=(4, 2)), sigma=0.25)
    x, y, w = prompts(1500, 3, prior, rng)
    error = {"continuous": 0.0, "discrete": 0.0, "mixture": 0.0}
    for x_KD, y_K, w_D in zip(x, y, w, strict=True):
        found = posterior(x_KD, y_K, prior)
        for name in error:
            error[name] += float(((getattr(found, name) - w_D) ** 2).sum())
    assert error["mixture"] < error["continuous"]
    assert error["mixture"] < error["discrete"]


def test_gate_of_a_model_that_mixes():
    c, d = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 3.0])
    assert estimated_gate(0.3 * d + 0.7 * c, c, d) == pytest.approx(0.3, abs=1e-14)


def test_the_regressor_sees_no_label_before_it_is_due():
    torch.manual_seed(0)
    model = Regressor(2, 5, layers=1, heads=2, width=8).eval()
    x, y = torch.randn(1, 5, 2), torch.randn(1, 5)
    other = y.clone()
    other[0, 2] += 1
    with torch.no_grad():
        a, b = model(x, y), model(x, other)
    assert torch.equal(a[0, :3], b[0, :3])
    assert (a[0, 3:] != b[0, 3:]).all()


TEXTS = ["What is 7 plus 15?", "a  b\n c ", "", " x", "Äß 90 zero-sum Café"]


@pytest.mark.parametrize("name", [n for n, c in BUILT_IN.items() if c.kind == "invertible"])
def test_round_trips(name):
    failed = round_trip_failures(BUILT_IN[name], TEXTS)
    # A digit's word that stands in the text already is listed, not hidden.
    assert failed == ([TEXTS[-1]] if name == "digit-words" else [])


def test_transforms_by_hand():
    said = {
        "leetspeak": "Wh47 15 7 plu5 15?",
        "pig-latin": "Atwhay isway 7 usplay 15?",
        "rot13": "Jung vf 7 cyhf 15?",
        "swap-case": "wHAT IS 7 PLUS 15?",
        "digit-words": "What is seven plus one-five?",
    }
    for name, text in said.items():
        assert BUILT_IN[name].apply(TEXTS[0]) == text
    assert BUILT_IN["letter-spacing"].apply("ab c") == "a b   c"
    assert BUILT_IN["letter-spacing"].invert("a b   cd") == "ab cd"
    assert BUILT_IN["identity"].apply(TEXTS[0]) is TEXTS[0]
    scale = conjugation({"scale": 1.5})
    assert scale.apply("3 and 2.5 make 7") == "4.5 and 3.75 make 10.5"
    assert scale.invert("4.5 and 3.75 make 10.5") == "3 and 2.5 make 7"
    words = conjugation({"words": {"yes": "oui", "cat": "chat"}})
    assert words.apply("Yes, cats and a cat") == "Oui, cats and a chat"
    assert words.invert("Oui, chat") == "Yes, cat"
    wrap = conjugation({"wrapper": "<{prompt}>"})
    assert (wrap.apply("a"), wrap.invert("<a>"), wrap.invert("a>")) == ("<a>", "a", "a>")


def test_composition_applies_in_order_and_undoes_in_reverse():
    both = composed([conjugation({"scale": 2}), conjugation("digit-words")])
    assert both.apply("7") == "one-four"
    assert both.invert("one-four") == "7"
    assert both.kind == "invertible"
    assert composed([BUILT_IN["rot13"], BUILT_IN["leetspeak"]]).kind == "verbatim"


def test_answers_of_a_verbatim_transform_go_back_by_their_table():
    back = with_answers(BUILT_IN["leetspeak"], ["to", "toast"])
    assert back.invert(" 70457 and more") == "toast"
    assert back.invert("70!") == "to"
    assert back.invert("else") == "else"
    with pytest.raises(ValueError, match="one text of the answers"):
        with_answers(BUILT_IN["leetspeak"], ["so", "50"])


@pytest.mark.parametrize(
    ("function", "query", "context"),
    [("repeat", "arithmetic", "What"), ("capitalise", "arithmetic", "WHAT"),
     ("repeat", "blank", "____"), ("capitalise", "blank", "____")],
)  # fmt: skip
def test_the_four_cells(function, query, context):
    cell = suite(function, query, count=20, seed=4)
    assert cell == suite(function, query, count=20, seed=4)
    assert cell != suite(function, query, count=20, seed=5)
    for one in cell:
        lines = one.prompt.split("\n")
        assert lines[0] == ("Repeat the input." if function == "repeat" else "Capitalize every character.")
        assert len(lines) == 7
        for i in (1, 3):
            shown = lines[i].removeprefix("Input: ")
            assert lines[i + 1] == "Output: " + (shown if function == "repeat" else shown.upper())
        asked = lines[5].removeprefix("Input: ")
        assert lines[6] == "Output:"
        assert one.in_context == context
        if query == "arithmetic":
            _, _, a, _, b = asked.rstrip("?").split()
            assert one.instructed == str(int(a) + int(b))
        else:
            country = asked.removeprefix("____ is the capital of ").rstrip(".")
            assert (country, one.instructed) in LANGUAGES["english"].countries


def test_scoring_with_and_without_a_space():
    assert starts_with("What is", ["What"])
    assert starts_with(" What is", ["What"])
    assert not starts_with("  What is", ["What"])
    assert not starts_with("12", ["What"])


DEV = np.arange(40) < 10


def scores(identity, other):
    """40 items of which these shares are right, dev and test alike."""
    return {t: np.concatenate([np.arange(n) < s * n for n in (10, 30)]).astype(float)
            for t, s in (("identity", identity), ("t", other))}  # fmt: skip


def test_recovery_index_and_verdicts():
    found = recovery(scores(1, 1), scores(0, 0.9), DEV, n_boot=300)
    assert found.chosen == "t"
    assert found.index == pytest.approx(0.9, abs=1e-12)
    assert found.verdict == "suppressed"
    assert found.low <= found.index <= found.high
    assert recovery(scores(1, 1), scores(0, 0), DEV, n_boot=300).verdict == "lost"
    # Without forgetting there is nothing to recover.
    none = recovery(scores(1, 1), scores(1, 1), DEV, n_boot=50)
    assert (none.index, none.verdict) == (None, "unclear")
    # Under a transform that the base cannot read, nothing seems forgotten; it is not chosen.
    assert recovery(scores(1, 0.2), scores(0, 0.2), DEV, n_boot=50).chosen is None
    # The base gains as much as the tuned model: the gap, and so the index, does not move.
    assert recovery(scores(0.6, 0.8), scores(0.4, 0.6), DEV, n_boot=50).index == pytest.approx(0.0, abs=1e-12)


class Characters:
    all_special_ids, pad_token_id, eos_token_id, unk_token_id = (0, 1, 2), 0, 2, 3

    def encode(self, text, add_special_tokens=True):
        return [ord(c) if ord(c) < 128 else 3 for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids if i > 3)


def decoded(options, prompt, says="nqq"):
    decoder, seen = get("decoding", SLUG).build(options), []

    def generate(model, prompts, ctx):
        seen.extend(prompts)
        return [SimpleNamespace(text=says, token_ids=(5,), finished=True) for _ in prompts]

    decoder.writer = SimpleNamespace(generate=generate)
    return decoder.generate(None, [prompt], SimpleNamespace(processor=Characters()))[0], seen[0]


def test_decoder_transforms_there_and_back_around_special_tokens():
    found, seen = decoded({}, [1, *b"abc", 2, *b"xy"])
    assert seen == [1, *b"nop", 2, *b"kl"]
    assert (found.text, found.token_ids, found.finished) == ("add", (), True)
    found, seen = decoded({"transform": "identity"}, [1, *b"abc"])
    assert (found.text, found.token_ids, seen) == ("nqq", (5,), [1, *b"abc"])
    found, seen = decoded({"transform": "leetspeak", "answers": ["yes", "no"]}, [1, *b"is it"], " y35.")
    assert (found.text, seen) == ("yes", [1, *b"15 17"])


def test_refusals_of_the_decoder():
    build = get("decoding", SLUG).build
    with pytest.raises(UserError, match="has no exact inverse; name the texts"):
        build({"transform": "pig-latin"})
    with pytest.raises(UserError, match=r"Did you mean|did you mean|rot13"):
        build({"transform": "rot31"})
    with pytest.raises(UserError, match="needs the slot"):
        build({"transform": {"wrapper": "no slot"}})
    with pytest.raises(UserError, match="above 0"):
        build({"transform": {"scale": -1}})
    with pytest.raises(UserError, match="two words have one translation"):
        build({"transform": {"words": {"a": "x", "b": "x"}}})
    with pytest.raises(UserError, match="does not know all of"):
        decoded({"transform": {"words": {"a": "é"}}}, [1, *b"a"])


class Session:
    """Answers a prompt with its row's answer where ``able`` says so, in the surface of the prompt."""

    def __init__(self, able, nats):
        self.able, self.nats, self.processor = able, nats, Characters()
        self.model = torch.nn.Linear(1, 1)

    def generate(self, rows, **options):
        return [[SimpleNamespace(text=self.able(row["prompt"]))] for row in rows]

    def render(self, rows):
        return SimpleNamespace(target_N=torch.tensor([t for r in rows for t in [*r["text"].encode(), 2]]))

    def evaluate_batch(self, batch, statistics):
        # The end of a text, which must not count, is very unlikely.
        return SimpleNamespace(logp_N=torch.where(batch.target_N == 2, -100.0, -self.nats))


def diagnosed(options, base, tuned, rows=20, verifier=None):
    given = [
        {"kind": "pair", "prompt": f"say {'ab'[i % 2]}", "completion": "ab"[i % 2], "extra": None} for i in range(rows)
    ]
    source = type("Rows", (), {"canonical": lambda self, i: given[i], "__len__": lambda self: rows})()
    judge = verifier or (
        lambda rows, texts, ctx: [float(t == r["completion"]) for r, t in zip(rows, texts, strict=True)]
    )
    ctx = SimpleNamespace(
        base=Session(base, 1.0),
        shop=SimpleNamespace(session=lambda model: Session(tuned, 3.0), measure=SimpleNamespace(verifier=judge)),
        data=SimpleNamespace(test=SimpleNamespace(prepared=source) if rows else None),
    )
    run = SimpleNamespace(folder=SimpleNamespace(name="one"), model=None)
    table = get("analysis", SLUG).build({"n_boot": 100, **options}).run([run], ctx)
    json.dumps(table.rows, allow_nan=False)
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_diagnosis_of_a_capability_that_is_only_suppressed():
    plain, swapped, chosen = diagnosed(
        {"transforms": ["swap-case"], "refusals": ["^sorry"]},
        base=lambda p: p[-1],
        tuned=lambda p: p[-1] if p.isupper() else "Sorry.",
    )
    assert (plain["base"], plain["tuned"], plain["forgetting"]) == (1, 0, 1)
    assert (swapped["base"], swapped["tuned"], swapped["forgetting"]) == (1, 1, 0)
    assert (plain["log p base"], plain["log p tuned"], plain["log ratio"]) == (-1, -3, -2)
    assert (plain["refusals base"], plain["refusals tuned"], swapped["refusals tuned"]) == (0, 1, 0)
    assert (chosen["transform"], chosen["recovery"], chosen["verdict"]) == ("chosen: swap-case", 1, "suppressed")
    *_, lost = diagnosed({"transforms": ["swap-case"]}, base=lambda p: p[-1], tuned=lambda p: "?")
    assert (lost["recovery"], lost["verdict"]) == (0, "lost")


def test_diagnosis_of_the_four_cells():
    def repeats(prompt):
        asked = prompt.split("\n")[-2].split(": ", 1)[1]
        return " " + (asked.upper() if prompt.split("\n")[2].isupper() else asked)

    found = diagnosed({"tasks": "ambiguity", "transforms": ["identity"], "languages": ["dutch"], "rows": 6},
                      base=repeats, tuned=lambda p: "12")  # fmt: skip
    cells = [line for line in found if line["base"] is not None]
    assert len(cells) == 8
    assert {line["transform"] for line in cells} == {"identity", "dutch"}
    by = {(line["task"], line["transform"]): (line["base"], line["tuned"]) for line in cells}
    assert by["repeat, arithmetic", "dutch"] == (1, 0)
    assert by["repeat, blank", "identity"] == (1, 0)


def test_refusals_of_the_analysis():
    with pytest.raises(UserError, match=r"data\.test"):
        diagnosed({}, str, str, rows=0)
    with pytest.raises(UserError, match="3 rows cannot be diagnosed"):
        diagnosed({"transforms": ["rot13"]}, str, str, rows=3)
    with pytest.raises(UserError, match="cannot be judged"):
        diagnosed({"transforms": ["rot13"]}, str, str, verifier=lambda rows, texts, ctx: [None] * len(rows))
    with pytest.raises(UserError, match="no language 'klingon'"):
        diagnosed({"languages": ["klingon"]}, str, str)
    with pytest.raises(UserError, match="refusals"):
        diagnosed({"refusals": ["("]}, str, str)
