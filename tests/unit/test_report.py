"""The report, the card and the manifest: right numbers, nothing of the data becomes markup, nothing is fetched."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from luthier.core.errors import UserError
from luthier.runs import plots
from luthier.runs import verdict as judging
from luthier.runs.card import fenced, write_card
from luthier.runs.manifest import finish_manifest, write_manifest
from luthier.runs.report import duration, read_metrics, short_count, write_report

EVIL = (
    "</p></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}{% raw %}&amp; https://evil.example/x"
)


def metric(value: float, half: float, unit: str = "share", direction: str = "higher", n: int = 100) -> dict:
    return {"value": value, "n": n, "low": value - half, "high": value + half, "unit": unit, "direction": direction}


def loss(value: float, half: float = 0.01) -> dict:
    return metric(value, half, "nats", "lower")


def evaluation(score: float = 0.6, kept: float = 1.3, ece: float = 0.02) -> dict:
    return {
        "before": {
            "target": {"loss": loss(2.0), "score": metric(0.2, 0.05), "tokens": metric(30, 1, "tokens", "lower")},
            "keep": {"stories: loss": loss(1.0), "plays: loss": loss(3.0)},
            "calibration": {"ece_equal_mass": metric(0.02, 0.005, "share, 15 bins", "lower")},
        },
        "after": {
            "target": {"loss": loss(1.0), "score": metric(score, 0.05), "tokens": metric(20, 1, "tokens", "lower")},
            "keep": {"stories: loss": loss(kept), "plays: loss": loss(3.0)},
            "calibration": {"ece_equal_mass": metric(ece, 0.005, "share, 15 bins", "lower")},
        },
        "training": {"steps": 20, "tokens": 4000, "seconds": 90.0, "stopped_early": True},
    }


def write_run(folder: Path, *, evil: str = "", **parts: object) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": s, "epoch": s / 10, "split": "train", "loss": 2 / s, "learning_rate": 2e-5, f"x{evil}": 1.0}
        for s in range(1, 21)
    ]
    lines += [{"step": s, "epoch": s / 10, "split": "eval", "loss": 1.0, "token_accuracy": 0.5} for s in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    files = {
        "evaluation.json": evaluation(),
        "data.json": {"train": {"name": "train", "read": {"rows": 9, "rejected": {f"empty{evil}": 2}}}, "keep": [{"name": "k", "rows": 1}]},
        "samples.json": [{"prompt": f"2+2?{evil}", "reference": "4", "before": f"5{evil}", "after": ["4"], "after_score": 1.0}] * 6,
        "manifest.json": {
            "started": "2026-01-02T03:04:05+00:00", "seed": 0,
            "model": {"id": f"base{evil}", "task": "causal-lm", "parameters": 1500, "fingerprint": "f" * 32},
            "methods": {"objective:sft": {}, "parameters:half-ft": {}}, "versions": {"luthier": "1.2.3"},
            "data": {f"train{evil}": {"rows": 9, "fingerprint": "d" * 32}}, "hardware": {"processor": f"cpu{evil}", "cores": 2},
        },
        **parts,
    }  # fmt: skip
    for name, value in files.items():
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    (folder / "recipe.yaml").write_text(f"luthier: 1  # {evil}\n# {evil}\nmodel: {evil}\nobjective: sft\n")
    return folder


class Page(HTMLParser):
    """Tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_what_a_reader_sees(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "my-run")).read_text())
    assert page.open == []
    for words in (
        "my-run", "base (1.5K parameters) · causal-lm · sft + half-ft · 2026-01-02",
        "A clear gain on the target, paid for with some forgetting.", "clear gain", "forgotten in part", "unchanged",
        "60.0 %", "+40.0 points", "Loss, stories", "+0.300 nats", "Answer length", "1 min 30 s", "steps (stopped early)",
        "Learning rate", "Evaluation: token accuracy", "2 more", "right", "Rejected: empty", "Keep: k", "objective:",
        "95 % confidence intervals", "Luthier 1.2.3",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.tags.count("svg") == 4  # loss, learning rate, token accuracy, and the further curve


def test_nothing_of_the_data_becomes_markup(tmp_path: Path) -> None:
    plain = Page(write_report(write_run(tmp_path / "run")).read_text())
    evil = Page(write_report(write_run(tmp_path / "evil" / "run", evil=EVIL)).read_text())
    assert evil.tags == plain.tags
    assert {k for k, _ in evil.attributes} == {k for k, _ in plain.attributes}
    assert evil.open == []
    assert "<script>alert(1)</script>" in evil.text
    assert "{{7*7}}{% raw %}&amp;" in evil.text
    assert "49" not in evil.text.replace("4.9", "")


def test_a_hostile_name_of_a_metric_is_text(tmp_path: Path) -> None:
    hostile = evaluation()
    for side in ("before", "after"):
        hostile[side]["keep"][f"{EVIL}: loss"] = {**loss(1.0), "unit": EVIL, "direction": EVIL}
    page = Page(write_report(write_run(tmp_path / "run", **{"evaluation.json": hostile})).read_text())
    assert "script" not in page.tags
    assert "img" not in page.tags


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run")).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed", "a", "base", "form"} & set(page.tags)
    assert not {"src", "href", "srcset", "action", "background", "xlink:href"} & {k for k, _ in page.attributes}
    assert not any(k.startswith("on") for k, _ in page.attributes)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    policy = next(v for k, v in page.attributes if k == "content" and v and "default-src" in v)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme:dark" in text


def test_absent_parts_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(UserError, match="not a run's folder"):
        write_report(folder)
    (folder / "recipe.yaml").write_text("luthier: 1\n")
    page = Page(write_report(folder).read_text())
    assert "No evaluation was made" in page.text
    assert "Before and after" not in page.text
    assert "svg" not in page.tags


def test_without_a_measurement_before(tmp_path: Path) -> None:
    later = {"after": evaluation()["after"]}
    page = Page(write_report(write_run(tmp_path / "run", **{"evaluation.json": later})).read_text())
    assert "The gain on the target is not known" in page.text
    assert "not measured before training" in page.text


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    odd = evaluation()
    odd["after"]["target"]["loss"] = {**loss(1.0), "value": None, "low": None, "high": None}
    odd["after"]["target"]["perplexity"] = metric(math.inf, 0, "perplexity", "lower")
    page = Page(write_report(write_run(tmp_path / "run", **{"evaluation.json": odd})).read_text())
    assert "∞" in page.text
    assert "nan" not in page.text.lower().split()


def test_metrics_of_a_killed_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    assert [r["step"] for r in read_metrics(file)] == [1.0]
    file.write_text('{"step": 1}\n{"lo\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read_metrics(file)
    assert read_metrics(tmp_path / "absent") == []


# -- the verdict


def test_change_combines_two_intervals_as_independent() -> None:
    # Newcombe (1998), table II: 56/70 against 48/80 by Wilson intervals, method 10: difference 0.2, 0.0524 to 0.3339.
    after = {"value": 56 / 70, "low": 0.6918, "high": 0.8769, "unit": "share", "direction": "higher", "n": 70}
    before = {"value": 48 / 80, "low": 0.4905, "high": 0.7004, "unit": "share", "direction": "higher", "n": 80}
    change = judging.compare("score", before, after)
    assert change.value == pytest.approx(0.2)
    assert (change.low, change.high) == (pytest.approx(0.0524, abs=2e-4), pytest.approx(0.3339, abs=2e-4))
    assert change.status == "better"
    assert judging.compare("score", before, before).status == "same"
    assert judging.compare("tokens", before, after).status == "unknown"
    assert judging.compare("loss", {**before, "direction": "lower"}, {**after, "direction": "lower"}).status == "worse"
    assert judging.compare("score", None, after).status == "unknown"


def test_paired_items_are_preferred() -> None:
    def items(scores: list[float]) -> list[dict]:
        return [{"row": i, "score": s, "completion": ""} for i, s in enumerate(scores)]

    known = evaluation(score=0.6)
    known["before"]["items"] = {"target": items([0.0] * 80 + [1.0] * 20)}
    known["after"]["items"] = {"target": items([0.0] * 40 + [1.0] * 60)}
    change = judging.changes(judging.with_paired_changes(known), "target")[1]
    assert (change.name, change.paired) == ("score", True)
    assert change.value == pytest.approx(0.4)
    # 40 ones and 60 zeros: standard error sqrt(0.4 * 0.6 / 100) = 0.049.
    assert change.low == pytest.approx(0.4 - 1.96 * 0.049, abs=0.03)
    assert change.high == pytest.approx(0.4 + 1.96 * 0.049, abs=0.03)


@pytest.mark.parametrize(
    ("score", "kept", "headline"),
    [
        (0.6, 1.3, "A clear gain on the target, paid for with some forgetting."),
        (0.6, 1.0, "A clear gain on the target, and nothing measurable was forgotten."),
        (0.6, 0.5, "A clear gain on the target, and general ability improved too."),
        (0.22, 1.3, "No clear gain on the target, though its loss fell, and something was forgotten."),
        (0.02, 1.0, "The target got worse; nothing measurable was forgotten."),
        (None, 1.0, "No clear gain on the target; nothing measurable was forgotten."),
    ],
)
def test_headlines(score: float | None, kept: float, headline: str) -> None:
    known = evaluation(0.6 if score is None else score, kept)
    if score is None:
        known["after"]["target"] = known["before"]["target"]
    if kept == 0.5:
        known["after"]["keep"]["plays: loss"] = loss(2.0)
    assert judging.verdict(known).headline == headline


def test_gains_and_losses_elsewhere_are_both_told() -> None:
    known = evaluation(kept=0.5)
    known["before"]["keep"]["stories: token_accuracy"] = metric(0.5, 0.01)
    known["after"]["keep"]["stories: token_accuracy"] = metric(0.4, 0.01)
    judged = judging.verdict(known)
    assert judged.headline == (
        "A clear gain on the target; general ability gained in some measures and lost in others."
    )
    assert (judged.cards[1].chip, judged.cards[1].status) == ("mixed", "worse")
    assert judged.cards[1].note.startswith("Token accuracy, stories: −10.0")


def test_the_source_that_lost_most_speaks_for_what_was_kept() -> None:
    card = judging.verdict(evaluation(kept=1.3)).cards[1]
    assert card.change is not None
    assert card.change.name == "stories: loss"
    assert card.sentence == (
        "Loss, stories went from 1.000\u00a0nats to 1.300\u00a0nats, +0.300\u00a0nats (interval +0.286 to +0.314)."
    )


@pytest.mark.parametrize(
    ("value", "unit", "signed", "shown"),
    [
        (0.6134, "share", False, "61.3\u00a0%"), (0.4921, "share", True, "+49.2\u00a0points"), (-0.03, "share", True, "−3.0\u00a0points"),
        (-0.0001, "share, 15 bins", True, "0.0\u00a0points"), (1.23456, "nats", False, "1.235\u00a0nats"), (12.345, "perplexity", False, "12.35"),
        (12345.6, "", False, "12,346"), (0.00012, "", True, "+0.00012"), (None, "nats", False, "–"), (math.nan, "", False, "–"), (math.inf, "", False, "∞"),
    ],
)  # fmt: skip
def test_numbers_for_readers(value: float | None, unit: str, signed: bool, shown: str) -> None:
    assert judging.text(value, unit, signed=signed) == shown


def test_durations_and_counts() -> None:
    assert [duration(s) for s in (0.5, 42, 200, 7500)] == ["0.5 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert [short_count(c) for c in (12, 260032, 7e9)] == ["12", "260K", "7B"]


# -- the plots


def test_ticks_are_round_and_cover_the_range() -> None:
    assert plots.nice_ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert plots.nice_ticks(0.13, 0.91) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert plots.nice_ticks(0, 2e-5) == [0, 5e-6, 1e-5, 1.5e-5, 2e-5]
    for low, high in ((3.0, 3.0), (0.0, 0.0), (-5, 7), (1e6, 1.2e6)):
        ticks = plots.nice_ticks(low, high)
        assert ticks[0] <= low <= high <= ticks[-1]
        assert 2 <= len(ticks) <= 8
    assert [plots.tick_text(v) for v in (0, 0.25, 1.5e-4, 2e-5, 12000, 3e6)] == [
        "0",
        "0.25",
        "1.5e-4",
        "2e-5",
        "12k",
        "3M",
    ]


def test_long_curves_become_means_with_a_band() -> None:
    points = [(float(i), float(i % 2)) for i in range(1000)]
    thinned = plots.thin(points, 100)
    assert len(thinned) == 100
    assert thinned[0] == (4.5, 0.5, 0.0, 1.0)
    assert plots.thin([(1.0, math.nan), (2.0, 3.0)]) == [(2.0, 3.0, 3.0, 3.0)]


def test_a_chart_is_well_formed_and_inside_its_frame() -> None:
    series = [
        plots.Series(EVIL, [(i, math.sin(i)) for i in range(500)]),
        plots.Series("e", [(250, 9.0)], "eval", dots=True),
    ]
    root = ET.fromstring(plots.line_chart(series, title=EVIL, x_label=EVIL))
    assert root.find("title").text == EVIL
    for shape in [*root.findall("polyline"), *root.findall("polygon")]:
        for pair in shape.get("points").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= plots.WIDTH
            assert 0 <= y <= plots.HEIGHT
    assert plots.line_chart([plots.Series("empty", [(1, math.nan)])], title="t") == ""


def test_a_straight_line_is_drawn_where_it_should_be() -> None:
    root = ET.fromstring(plots.line_chart([plots.Series("s", [(0, 0.0), (10, 10.0)])], title="t"))
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in root.find("polyline").get("points").split())
    assert (x0, y0, x1, y1) == (46, 216 - 34, 360 - 12, 12)


# -- card and manifest


def test_the_card(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "model").mkdir()
    card = write_card(folder).read_text()
    assert (folder / "model" / "README.md").read_text() == card
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["luthier"]}
    assert "**A clear gain on the target, paid for with some forgetting.**" in card
    assert "| General ability | Loss, stories | 1.000 nats (0.990 to 1.010) |" in card
    assert 'AutoModelForCausalLM.from_pretrained("model")' in card


def test_the_card_of_an_adapter_names_its_base(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["id"] = "someone/some-model"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model").mkdir()
    (folder / "model" / "adapter_config.json").write_text("{}")
    card = write_card(folder).read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/some-model"
    assert "PeftModel.from_pretrained(base" in card


def test_the_card_escapes_texts(tmp_path: Path) -> None:
    card = write_card(write_run(tmp_path / "run", evil=EVIL + "\n# not a heading | a cell")).read_text()
    outside = re.sub(r"(?s)(`{3,})(python|yaml)\n.*?\n\1", "", card)
    assert "<script" not in outside
    assert "<img" not in outside
    assert "\n# not a heading" not in outside
    assert fenced("a ```` b", "yaml").startswith("`````yaml\n")


def test_the_manifest(tmp_path: Path) -> None:
    method = SimpleNamespace(axis="objective", slug="sft")
    plan = SimpleNamespace(
        recipe={"seed": 3, "model": "m"}, choices=lambda: [SimpleNamespace(method=method, options={"a": 1})]
    )
    loaded = SimpleNamespace(
        model=torch.nn.Linear(3, 2), id="m", task="causal-lm", fingerprint="f" * 32, labels=("x",), notes=("n",)
    )
    rows = SimpleNamespace(layout="pair", fingerprint="d" * 32)
    train = SimpleNamespace(name="train", rows=rows, prepared=[1, 2, 3])
    data = SimpleNamespace(train=train, test=None, keep=[SimpleNamespace(name="k", rows=rows, prepared=[1])])
    write_manifest(tmp_path, plan, loaded, data)
    finish_manifest(tmp_path, steps=7)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found["model"] == {
        "id": "m",
        "task": "causal-lm",
        "fingerprint": "f" * 32,
        "parameters": 8,
        "labels": ["x"],
        "notes": ["n"],
    }
    assert found["data"] == {
        "train": {"layout": "pair", "rows": 3, "fingerprint": "d" * 32},
        "keep: k": {"layout": "pair", "rows": 1, "fingerprint": "d" * 32},
    }
    assert (found["seed"], found["methods"], found["result"]) == (3, {"objective:sft": {"a": 1}}, {"steps": 7})
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert found["hardware"]["cores"] >= 1
    assert found["started"] <= found["finished"]


@pytest.mark.parametrize("values", [[0.5] * 6, [0.5012, 0.5012000000000001, 0.5012], [0.0, 0.0], [-3.0]])
def test_a_constant_curve_is_drawn(values):
    from luthier.runs import plots

    svg = plots.line_chart([plots.Series("share", list(enumerate(values)))], title="constant")
    assert svg.startswith("<svg")
    assert "nan" not in svg
