"""The end of an advice: the verdict, the recipe that is written, the page, and the small things around them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from luthier.advisor.budget import seconds_of
from luthier.advisor.hold_out import hold_out
from luthier.advisor.page import write_page
from luthier.advisor.recommend import written
from luthier.advisor.rules import RULES
from luthier.advisor.verdict import conclude, unraced
from luthier.core.errors import UserError
from luthier.recipe.load import load
from luthier.recipe.source import parse

TARGET = {"name": "target/score", "group": "target", "label": "Answers judged right", "unit": "share",
          "direction": "higher", "primary": True}  # fmt: skip
KEEP = {"name": "keep/loss", "group": "keep", "label": "Loss on general text", "unit": "nats",
        "direction": "lower", "primary": True}  # fmt: skip


def against(value, verdict, spread=0.02):
    return {"value": value, "low": value - spread, "high": value + spread, "verdict": verdict}


def entry(name, score, keep=2.0, *, target="same", kept="same", base="better", kind="method"):
    made = {
        "name": name, "kind": kind, "status": "done", "reason": None,
        "values": {"target/score": {"value": score}, "keep/loss": {"value": keep}},
        "vs_base": {"target/score": against(score - 0.3, base)},
    }  # fmt: skip
    if kind == "method":
        made["vs_sft"] = {"target/score": against(score - 0.5, target), "keep/loss": against(keep - 2.0, kept)}
    return made


def comparison(*methods, sft=None):
    return {
        "metrics": [TARGET, KEEP],
        "entries": [sft or entry("sft", 0.5, kind="sft"), *methods],
        "seeds": [0, 1, 2],
        "confidence": 0.95,
    }


def test_the_best_of_those_that_beat_sft_is_recommended():
    found = conclude(
        comparison(entry("a", 0.6, target="better"), entry("b", 0.7, target="better"), entry("c", 0.9, target="same"))
    )
    assert (found.entry, found.beats_sft) == ("b", True)
    assert found.headline == "b beat plain SFT: answers judged right +20.0\u00a0points (+18.0 to +22.0)."
    assert len(found.sentences) == 3


def test_nothing_beat_plain_sft_is_said_plainly():
    found = conclude(comparison(entry("a", 0.51), entry("b", 0.3, target="worse")))
    assert (found.entry, found.beats_sft) == ("sft", False)
    assert found.headline.startswith("Nothing beat plain SFT")


def test_level_on_the_target_and_gentler_on_the_rest():
    found = conclude(comparison(entry("a", 0.5, 1.8, kept="better"), entry("b", 0.5, 1.9, kept="better")))
    assert (found.entry, found.beats_sft) == ("a", False)
    assert "Nothing beat plain SFT on the target; a is level there and keeps more" in found.headline


def test_training_that_does_not_beat_the_base_is_not_recommended():
    right = [r for r in RULES if r.name == "already right"]
    found = conclude(comparison(sft=entry("sft", 0.3, kind="sft", base="same")), right)
    assert found.entry == "base"
    assert found.headline.startswith("Do not fine-tune: training did not help clearly")
    assert right[0].why in found.sentences
    hurt = conclude(comparison(sft=entry("sft", 0.1, kind="sft", base="worse")))
    assert "training hurt" in hurt.headline


def test_a_loss_that_fell_counts_where_the_score_leaves_room():
    learning = entry("sft", 0.02, kind="sft", base="same")
    learning["vs_base"]["target/loss"] = against(-1.0, "better")
    for score, recommended in ((0.02, "sft"), (0.95, "base")):
        base = {"name": "base", "kind": "base", "status": "done", "values": {"target/score": {"value": score}}}
        made = comparison(sft=learning)
        found = conclude(made | {"entries": [base, *made["entries"]]})
        assert found.entry == recommended
    assert "train longer before judging" not in found.sentences[-1]


def test_controls_at_equal_tokens_are_told_and_not_recommended():
    control = entry("deduplicate (equal tokens)", 0.9, target="better") | {"held_to": "tokens"}
    found = conclude(comparison(entry("deduplicate", 0.5), control))
    assert found.entry == "sft"
    assert any(s.startswith("deduplicate (equal tokens)") for s in found.sentences)


def test_lower_is_better_is_read_as_such():
    loss = {**TARGET, "direction": "lower", "unit": "nats"}
    made = comparison(entry("a", 0.4, target="better"), entry("b", 0.3, target="better")) | {"metrics": [loss]}
    assert conclude(made).entry == "b"


def test_failed_trials_do_not_win_and_a_failed_sft_ends_it():
    lost = entry("a", 0.9, target="better") | {"status": "failed"}
    assert conclude(comparison(lost)).entry == "sft"
    assert "plain SFT did not finish" in conclude(comparison(sft=entry("sft", 0.5) | {"status": "failed"})).headline


def test_without_a_race_only_the_rules_speak():
    assert "nothing is shown" in unraced("half-ft", []).headline
    assert unraced("half-ft", [r for r in RULES if r.kind == "do not fine-tune"][:1]).entry == "base"
    assert unraced(None, []).entry == "sft"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("2h", 7200), ("1h30m", 5400), ("0.5h", 1800), (45, 45)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "20 minutes", "m", "-5m", "0s", 0, True, float("inf")])
def test_what_is_no_budget(text):
    with pytest.raises(UserError, match=r"Write 90s, 20m, 2h or 1h30m\."):
        seconds_of(text)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_rows_are_apart_by_content_and_made_once(tmp_path):
    entries = [{"prompt": str(i % 900), "completion": "x"} for i in range(1000)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(e) + "\n" for e in entries))
    files = hold_out(str(source), tmp_path / "data", parts=2, seed=0)
    train, select, test = map(rows_of, files)
    assert [f.name for f in files] == ["train.jsonl", "select.jsonl", "test.jsonl"]
    assert len(train) + len(select) + len(test) == 1000
    sides = [{r["prompt"] for r in part} for part in (train, select, test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert 60 <= len(select) <= 140  # a tenth
    before = files[1].stat().st_mtime_ns
    assert hold_out(str(source), tmp_path / "data", parts=2, seed=0)[1].stat().st_mtime_ns == before


def test_too_few_rows_to_hold_any_out(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": str(i), "completion": "x"}) + "\n" for i in range(30)))
    with pytest.raises(UserError, match=r"has 30 rows.*--no-race"):
        hold_out(str(source), tmp_path / "data", parts=1, seed=0)
    assert not (tmp_path / "data").exists()


def test_the_recommended_recipe_is_the_recipe_with_its_reasons():
    recipe = load(
        {
            "model": "lab:nano",
            "data": {"train": "lab:arithmetic", "test": "lab:arithmetic", "stages": ["deduplicate"]},
            "objective": {"anchored-sft": {"anchor_weight": 0.5}},
            "training": {"learning_rate": 2e-4, "epochs": 3},
            "output": "runs/x",
        }
    )
    text = written(recipe, {"objective": "Because of noise. " * 12, "weights": "not there"}, ["First.", "Second: it's"])
    assert text.startswith("# First.\n# Second: it's\n")
    assert "# Because of noise." in text
    assert "anchored-sft:" in text
    assert "not there" not in text
    assert all(len(line) <= 120 for line in text.splitlines())
    again = load(parse(text, "recommended.yaml")[0])
    assert again.model_dump() == recipe.model_dump()


class Page(HTMLParser):
    """Open elements, and the text of the page."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "line", "circle", "polyline", "polygon"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


EVIL = "<script>alert('&\"x\"')</script>"


def advice(**changes):
    finding = {"name": EVIL, "value": 0.25, "n": 100, "low": 0.2, "high": 0.3, "unit": f"share {EVIL}",
               "sentence": EVIL, "follows": EVIL}  # fmt: skip
    silent = finding | {"value": None, "low": None, "high": None, "n": 0, "unit": ""}
    standing = {
        "entry": EVIL, "status": "stopped", "reason": EVIL, "step": 10, "total": 100,
        "scores": {"0.1": 0.5, "0.3": None}, "dynamics": {"G": 1.5, "Lt": 2.25, "combined": -1.0}, "rate": 0.1,
    }  # fmt: skip
    rule = {"rule": EVIL, "why": EVIL, "source": EVIL}
    made = {
        "luthier": "0.1.0", "model": EVIL, "data": EVIL, "task": EVIL, "budget": 1200.0, "seconds": 300.0,
        "verdict": {"headline": EVIL, "sentences": [EVIL], "entry": "sft"},
        "findings": [finding, silent],
        "rules": {"candidates": [{"entry": EVIL, **rule}], "remarks": [{**rule, "kind": "mend"}], "left_out": {EVIL: EVIL}},
        "race": {"standings": [standing], "notes": [EVIL]},
        "comparison": comparison(entry(EVIL, 0.6, target="better")),
        "recommended": f"objective: {EVIL}\n# {EVIL}\n",
    }  # fmt: skip
    return made | changes


def test_everything_on_the_page_is_escaped_and_nothing_is_loaded(tmp_path):
    page = write_page(advice(), tmp_path / "advice.html")
    text = page.read_text(encoding="utf-8")
    parsed = Page()
    parsed.feed(text)
    assert parsed.open == []
    assert not [t for t, _ in parsed.tags if t in ("script", "iframe", "img", "object")]
    assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on") or a == "src"]
    assert [attrs["href"] for t, attrs in parsed.tags if t == "link"] == ["data:,"]
    assert "default-src 'none'" in text
    assert "".join(parsed.text).count(EVIL) >= 20
    assert "25.0" in text
    assert "1.5" in text
    assert "+10.0" in text


def test_a_page_without_a_race_leaves_it_out(tmp_path):
    text = write_page(advice(race=None, comparison=None), tmp_path / "advice.html").read_text(encoding="utf-8")
    assert "The race" not in text
    assert "The final comparison" not in text
