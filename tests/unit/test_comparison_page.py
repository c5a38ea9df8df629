"""The page of a comparison: what a reader sees, that nothing of the data becomes markup, and that it works in Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparison_example import comparison

from luthier.comparison import page_plots as plots
from luthier.comparison.page import embedded, write_page
from luthier.comparison.page_items import MOST, majority, wins_and_losses
from luthier.comparison.page_values import cost_text
from luthier.runs.plots import Frame

EVIL = "</script></svg></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'`{{7*7}}&amp; https://evil.example/x\u2028"
VOID = {"meta", "link", "br", "input", "img"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; a tag that closes another fails at once."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(found: dict[str, Any], folder: Path) -> Page:
    return Page(write_page(found, folder / "comparison.html").read_text(encoding="utf-8"))


def replaced(value: Any, mark: str) -> Any:
    """A copy with ``mark`` at the end of every text that a user, a model or an exception may have written."""
    if isinstance(value, dict):
        return {
            k: v if k in ("kind", "status", "group", "direction", "verdict") else replaced(v, mark)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [replaced(v, mark) for v in value]
    return f"{value}{mark}" if isinstance(value, str) else value


def hostile() -> dict[str, Any]:
    """The example with a hostile ending on all its texts, names of entries and metrics too."""
    found = replaced(comparison(), EVIL)
    for entry in found["entries"]:
        for part in ("values", "vs_sft", "vs_base"):
            if part in entry:
                entry[part] = {f"{k}{EVIL}": v for k, v in entry[part].items()}
    for cost, named in zip(found["costs"], comparison()["costs"], strict=True):
        cost["name"] = named["name"]  # a cost's name decides its unit and whether it is shown at first
    for item in found["items"]:
        item["answers"] = {f"{k}{EVIL}": v for k, v in item["answers"].items()}
    return found


def test_what_a_reader_sees(tmp_path: Path) -> None:
    page = page_of(comparison(), tmp_path)
    assert page.open == []
    for words in (
        "lab:nano on additions", "lab:nano · causal-lm · 3 seeds · budget 240,000 supervised tokens · 2026-11-28",
        "clear-curation answers 6.5 points more than plain SFT", "held to the same supervised tokens", "held to the same rows",
        "71.3 %", "68.3 to 74.3", "+6.5 points", "+2.9 to +10.1", "no clear difference", "the reference", "1 min 28 s", "1.19 TFLOP",
        "some trials failed", "seed 2: the loss is not finite at step 312 (rows 17, 41)", "needs 41 GiB", "p 0.000", "Holm 0.003",
        "higher is better", "lower is better", "excludes zero", "Holm's correction", "anchor_weight: 0.1", "one of each entry (seed 0)",
        "at ten times SFT's learning rate", "On the front: base, anchored-sft(anchor_weight=0.1)+half-ft,", "beside others",
    ):  # fmt: skip
        assert words.replace("p 0.000", "p < 0.001") in page.text.replace("\N{NO-BREAK SPACE}", " "), words
    headline = next(i for i, (tag, a) in enumerate(page.tags) if a.get("class") == "headline")
    assert headline < next(i for i, (tag, _) in enumerate(page.tags) if tag == "table")
    assert len(page.all("figure")) == 3 + 2 + 1 + 8


def test_structure_for_screen_readers(tmp_path: Path) -> None:
    page = page_of(comparison(), tmp_path)
    tags = [tag for tag, _ in page.tags]
    assert [tags.count(t) for t in ("header", "main", "footer", "nav", "h1")] == [1, 1, 1, 1, 1]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(named) <= set(ids)
    assert {a["href"][1:] for a in page.all("a")} <= set(ids)  # type: ignore[index]
    assert all(a.get("scope") in ("col", "row", "colgroup") for a in page.all("th"))
    assert tags.count("caption") == tags.count("table")
    drawings = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) == 14
    assert all(a.get("role") == "img" for a in drawings)
    assert tags.count("desc") == len(drawings)
    assert all(a.get("type") == "button" for a in page.all("button"))


def test_nothing_of_the_data_becomes_markup(tmp_path: Path) -> None:
    plain, evil = page_of(comparison(), tmp_path), page_of(hostile(), tmp_path)
    # Drawings with long names say where to look them up, in one text more.
    assert [tag for tag, _ in evil.tags if tag != "text"] == [tag for tag, _ in plain.tags if tag != "text"]
    assert [set(a) for tag, a in evil.tags if tag != "text"] == [set(a) for tag, a in plain.tags if tag != "text"]
    assert evil.open == []
    assert "<script>alert(1)</script>" in evil.text
    assert "{{7*7}}&amp;" in evil.text
    data = evil.scripts[0]
    assert "<" not in data
    assert "\u2028" not in data
    assert json.loads(data)["items"][0]["prompt"].endswith(EVIL)


def test_json_in_a_script_cannot_end_it() -> None:
    value = {"a</script><!--": ["<script>", "&", "\u2028\u2029", "'\""]}
    assert not set("<>&\u2028\u2029") & set(embedded(value))
    assert json.loads(embedded(value)) == value


def test_one_script_runs_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(comparison(), tmp_path)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert [a.get("type") for a in page.all("script")] == ["application/json", None]
    assert not {"img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    assert not any(k.startswith("on") or k in ("src", "srcset", "action") for _, a in page.tags for k in a)
    assert "innerHTML" not in page.scripts[-1]
    text = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    assert "prefers-reduced-motion" in text


# -- comparisons that lack something


def empty(seeds: int = 1) -> dict[str, Any]:
    found = comparison(seeds=seeds)
    return {**found, "entries": [], "items": [], "findings": [], "pareto": {}, "notes": [], "metrics": [], "costs": []}


def test_before_anything_is_known(tmp_path: Path) -> None:
    for found in (empty(), {"entries": []}, {}):
        page = page_of(found, tmp_path)
        assert page.open == []
        assert "no trial has finished" in page.text
        assert not page.all("figure")


def test_one_seed_and_one_method(tmp_path: Path) -> None:
    found = comparison(seeds=1)
    found["entries"] = found["entries"][:3]
    found["budget"] = {"kind": "rows", "amount": None}
    page = page_of(found, tmp_path)
    assert "1 seed · same rows for all" in page.text
    assert "and the same 1 seeds" not in page.text
    assert "mean of" not in page.text
    assert json.loads(page.scripts[0])["methods"][0]["name"] == "anchored-sft(anchor_weight=0.1)+half-ft"


@pytest.mark.parametrize("group", ["target", "keep", "calibration", "drift"])
def test_a_group_that_was_not_measured(tmp_path: Path, group: str) -> None:
    found = comparison()
    found["metrics"] = [m for m in found["metrics"] if m["group"] != group]
    page = page_of(found, tmp_path)
    titles = {
        "target": "Target",
        "keep": "Kept ability (forgetting)",
        "calibration": "Calibration error",
        "drift": "Drift from the base",
    }
    assert titles[group] not in page.words
    assert ("Gain against forgetting" in page.text) == (group not in ("target", "keep"))
    assert ("Gain against cost" in page.text) == (group != "target")


def test_a_group_without_a_title_is_shown_under_its_name(tmp_path: Path) -> None:
    found = comparison()
    found["metrics"].append({"name": "drift/weights", "group": "speed of light", "label": "Again", "unit": "share"})
    page = page_of(found, tmp_path)
    assert "speed of light" in page.words
    assert "Again" in page.text


def test_a_task_that_does_not_write(tmp_path: Path) -> None:
    page = page_of(comparison() | {"items": []}, tmp_path)
    assert "Wins and losses" not in page.text
    assert len(page.scripts) == 1


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_values_that_are_no_numbers(tmp_path: Path, nothing: float | None) -> None:
    def gone(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: v if k == "sections" else gone(v) for k, v in value.items()}
        if isinstance(value, list):
            return [gone(v) for v in value]
        return nothing if isinstance(value, float) else value

    page = page_of(gone(comparison()), tmp_path)
    assert page.open == []
    assert not re.search(r"\b(nan|None|inf)\b", page.text, re.IGNORECASE)
    assert not any("nan" in (v or "").lower().split() for _, a in page.tags for v in a.values())
    assert all(math.isfinite(float(a["data-sort"] or "")) for a in page.all("td") if "data-sort" in a)
    assert page.text.count("not known") >= 9 * 8


def test_every_entry_failed(tmp_path: Path) -> None:
    found = comparison()
    found["entries"] = [found["entries"][-1] | {"name": "sft", "kind": "sft"}]
    page = page_of(found, tmp_path)
    assert "needs 41 GiB" in page.text
    assert not page.all("figure")


# -- who won


def answers(*scores: float | bool | None) -> list[dict[str, Any]]:
    return [{"seed": i, "completion": f"c{s}", "score": s} for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((1, 1, 0), 1), ((1, 0, 0), 0), ((1, 0), 0), ((True, True), 1), ((0.2, 0.9, 0.5), 0.5), ((None, 1, math.nan), 1), ((None,), None), ((), None)],
)  # fmt: skip
def test_the_score_of_most_seeds(scores: tuple[Any, ...], expected: float | None) -> None:
    assert majority(answers(*scores)) == expected


def test_wins_and_losses_are_counted_by_hand() -> None:
    entries = [
        {"name": n, "kind": k} for n, k in (("base", "base"), ("sft", "sft"), ("m", "method"), ("absent", "method"))
    ]
    rows = [
        ((1, 1, 0), (0, 0, 1)),  # lost
        ((0, 0, 1), (1, 1, 1)),  # won
        ((1, 1, 1), (1, 1, 0)),  # right in most seeds on both sides
        ((None, None, None), (1, 1, 1)),  # SFT was not judged
        ((0, 0, 0), (0, 1, 1)),  # won
    ]
    items = [{"row": 10 + i, "prompt": "p", "reference": None, "answers": {"base": answers(0), "sft": answers(*s), "m": answers(*m)}}
             for i, (s, m) in enumerate(rows)]  # fmt: skip
    found = wins_and_losses(items, entries)
    assert found is not None
    (method,) = found["methods"]
    assert [method[k] for k in ("entry", "won", "lost", "same", "unjudged")] == [2, 2, 1, 1, 1]
    assert [(found["items"][place]["row"], outcome) for place, outcome in method["shown"]] == [
        (10, "lost"),
        (11, "won"),
        (14, "won"),
    ]
    assert found["items"][0]["answers"]["1"] == [
        {"seeds": [0, 1], "score": 1.0, "text": "c1"}, {"seeds": [2], "score": 0.0, "text": "c0"},
    ]  # fmt: skip
    assert (found["base"], found["sft"]) == (0, 1)
    assert wins_and_losses([], entries) is None


def test_the_list_is_capped_and_the_count_is_not() -> None:
    entries = [{"name": "sft", "kind": "sft"}, {"name": "m", "kind": "method"}]
    items = [{"row": i, "prompt": "p", "answers": {"sft": answers(0), "m": answers(1)}} for i in range(MOST + 25)]
    found = wins_and_losses(items, entries)
    assert found is not None
    assert (found["methods"][0]["won"], len(found["methods"][0]["shown"])) == (MOST + 25, MOST)
    assert len(found["items"]) == MOST


# -- numbers and drawings


def test_costs_for_readers() -> None:
    shown = [cost_text(*c).replace("\N{NO-BREAK SPACE}", " ") for c in (
        ("seconds", 200.0), ("flops", 1.234e12), ("flops", 12.0), ("peak_memory_bytes", 3 * 2**29), ("trainable_share", 0.0213),
        ("supervised_tokens", 20000), ("steps", None), ("rows", math.nan),
    )]  # fmt: skip
    assert shown == ["3 min 20 s", "1.23 TFLOP", "12 FLOP", "1.5 GiB", "2.13 %", "20,000", "–", "–"]


def test_short_labels() -> None:
    assert plots.shortened("anchored-sft(anchor_weight=0.1)+half-ft") == "anchored-sft+half-ft"
    assert plots.shortened("a(b=f(1))+c") == "a+c"
    assert plots.shortened("(all)") == "(all)"
    assert plots.shortened("x" * 40) == "x" * 23 + "…"
    found = plots.looks(["base", "sft", *"abcdefghij"], ["base", "sft", *["method"] * 10])
    assert [look.label for look in found[:3]] == ["base", "sft", "1 a"]
    assert len({look.role for look in found}) == 12


def test_labels_in_a_trade_off_do_not_cover_each_other() -> None:
    frame = Frame((0, 1), (0, 1), [0, 1], [0, 1], width=360, height=280, top=38)
    points = [(150.0 + 9 * i, 150.0 + 5 * (i % 3)) for i in range(5)]
    labels = [f"{i} method" for i in range(5)]
    places, covered = plots.place_labels(points, labels, frame)
    assert covered < 12 * len(points)
    boxes = []
    for (x, y, anchor), label in zip(places, labels, strict=True):
        length = 5.9 * len(label)
        left = x - {"start": 0, "middle": length / 2, "end": length}[anchor]
        boxes.append((left, y - 9, left + length, y + 3))
        assert 0 <= left <= 360 - length
    overlaps = [
        (min(a[2], b[2]) - max(a[0], b[0])) * (min(a[3], b[3]) - max(a[1], b[1]))
        for i, a in enumerate(boxes) for b in boxes[:i]
        if min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
    ]  # fmt: skip
    assert sum(overlaps) == 0


def test_in_a_crowd_only_numbers_are_written() -> None:
    names = plots.looks(["base", *(f"method-with-a-name-{i}" for i in range(12))], ["base", *["method"] * 12])
    spots = [plots.Spot(look, 5 + 0.1 * (i % 4), 3 + 0.05 * (i % 5)) for i, look in enumerate(names)]
    root = ET.fromstring(plots.trade_off([*spots, plots.Spot(names[0], 0, 0)], title="t", x_label="x", y_label="y"))
    written = [t.text for t in root.iter("text") if t.get("class") == "name"]
    assert written == ["base", *map(str, range(1, 13)), "base"]
    assert "numbers as in the table" in "".join(root.itertext())


def test_the_front_is_drawn_through_its_points() -> None:
    names = plots.looks(["base", "a", "b"], ["base", "method", "method"])
    spots = [
        plots.Spot(names[0], 0, 0, front=True),
        plots.Spot(names[1], 2, 4, front=True, words=EVIL),
        plots.Spot(names[2], 3, 1),
    ]
    root = ET.fromstring(plots.trade_off(spots, title=EVIL, x_label=EVIL, y_label=EVIL))
    line = next(p for p in root.iter("polyline") if p.get("class") == "front")
    circles = [c for c in root.iter("circle") if c.get("class") == "spot front"]
    assert line.get("points") == " ".join(f"{float(c.get('cx') or 0):g},{float(c.get('cy') or 0):g}" for c in circles)
    # Higher is up, and to the right is more.
    assert float(circles[1].get("cy") or 0) < float(circles[0].get("cy") or 0)
    assert float(circles[1].get("cx") or 0) > float(circles[0].get("cx") or 0)


def test_the_mean_curve_goes_as_far_as_all_whole_seeds() -> None:
    assert plots.mean_curve([[(0, 1.0), (2, 3.0), (4, 5.0)], [(0, 3.0), (4, 4.0)]]) == [(0.0, 2.0), (3.0, 3.5)]
    look = plots.Look(0, "c0", "1", "m")
    curves = [plots.Curve(look, 0, [(0, 1.0), (1, 2.0), (2, 3.0)]), plots.Curve(look, 1, [(0, 9.0)], whole=False)]
    root = ET.fromstring(plots.learning_curves(curves, title="t", x_label="x", y_label="y"))
    (mean,) = [p for p in root.iter("polyline") if p.get("class") == "mean"]
    assert len((mean.get("points") or "").split()) == 3


# -- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


def opened(browser: Any, found: dict[str, Any], folder: Path, width: int = 1280) -> Path:
    page = write_page(found, folder / "comparison.html")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    reduced(browser)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    return page


def reduced(browser: Any, scheme: str = "light") -> None:
    """Nothing scrolls smoothly, so that a click finds its target where it was."""
    wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def entries_shown(browser: Any) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#entries-table tbody th')].map(h => h.dataset.sort)"
    )


def sorted_heads(browser: Any) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('[aria-sort]')].map(h => h.ariaSort)")


ASKED = [e["name"] for e in comparison(1, 1)["entries"]]


def test_in_chromium_heads_sort_by_click(browser: Any, tmp_path: Path) -> None:
    opened(browser, comparison(), tmp_path)
    assert entries_shown(browser) == ASKED
    assert sorted_heads(browser) == []
    score, loss = browser.find_elements("css selector", "#entries-table th:not(.more) > button")[1:3]
    score.click()
    best = entries_shown(browser)
    # By the values of the example: 0.713, 0.702, 0.671, 0.655, 0.648, 0.622, 0.583, 0.31; what failed has none and comes last.
    assert best == ["clear-curation", "clear-curation, rows", "anchored-sft(anchor_weight=0.1)+half-ft", "uds", "sft", "lora(rank=8)",
                    "beyond-log-likelihood", "base", "unfair-luck"]  # fmt: skip
    assert sorted_heads(browser) == ["descending"]
    score.click()
    assert entries_shown(browser) == [*reversed(best[:-1]), "unfair-luck"]
    score.click()
    assert entries_shown(browser) == ASKED
    loss.click()
    assert sorted_heads(browser) == ["ascending"]
    assert entries_shown(browser)[:2] == ["base", "anchored-sft(anchor_weight=0.1)+half-ft"]
    assert "Sorted by" in browser.find_element("id", "sorted").text


def test_in_chromium_heads_sort_by_keyboard(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    opened(browser, comparison(), tmp_path)
    browser.find_element("id", "all-columns").click()
    browser.find_element("id", "all-columns").click()
    # From the button before the table: its scrolling region, the head of the names, the head of the scores.
    ActionChains(browser).send_keys(Keys.TAB * 3).perform()
    focused = browser.switch_to.active_element
    assert focused.text.startswith("Answers judged right")
    assert browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", focused) == "solid"
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert entries_shown(browser)[0] == "clear-curation"
    ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert entries_shown(browser)[0] == "base"
    assert browser.switch_to.active_element == focused


def test_in_chromium_all_measures_can_be_shown(browser: Any, tmp_path: Path) -> None:
    opened(browser, comparison(), tmp_path)
    shown = "return [...document.querySelectorAll('#entries-table thead tr:nth-child(2) th')].filter(h => h.offsetWidth).length"
    spans = "return [...document.querySelectorAll('#entries-table thead tr:nth-child(1) th')].reduce((s, h) => s + h.colSpan, 0)"
    assert (browser.execute_script(shown), browser.execute_script(spans)) == (1 + 4 + 4, 8)
    browser.find_element("id", "all-columns").click()
    assert (browser.execute_script(shown), browser.execute_script(spans)) == (1 + 8 + 8, 16)


def test_in_chromium_curves_can_be_hidden(browser: Any, tmp_path: Path) -> None:
    opened(browser, comparison(), tmp_path)
    button = browser.find_element("css selector", "[data-toggles='3']")
    curve = browser.find_element("css selector", "[data-curve='3']")
    assert curve.is_displayed()
    button.click()
    assert (curve.is_displayed(), button.get_attribute("aria-pressed")) == (False, "false")
    button.click()
    assert curve.is_displayed()


def test_in_chromium_items_can_be_filtered(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import Select

    found = comparison()
    method = wins_and_losses(found["items"], found["entries"])["methods"][5]  # type: ignore[index]
    assert method["lost"] > 10 > method["won"] > 0  # the list has more than one page, and the filter something to do
    opened(browser, found, tmp_path)
    Select(browser.find_element("id", "item-method")).select_by_index(5)
    count = browser.find_element("id", "item-count")
    cards = "return [...document.querySelectorAll('#item-list article')].map(a => a.dataset.outcome)"
    assert count.text.startswith(f"{method['won'] + method['lost']} items won or lost")
    assert len(browser.execute_script(cards)) == 10
    for outcome in ("won", "lost"):
        browser.find_element("css selector", f"[value={outcome}] + span").click()
        assert count.text.startswith(f"{method[outcome]} items {outcome}")
        assert browser.execute_script(cards) == [outcome] * min(10, method[outcome])
    browser.find_element("css selector", "[value=lost] + span").click()
    browser.find_element("id", "item-more").click()
    assert browser.execute_script(cards) == ["lost"] * min(20, method["lost"])
    assert browser.switch_to.active_element.tag_name == "article"
    text = browser.find_element("id", "item-list").text
    assert "What is" in text
    assert "✓ right" in text
    fold = browser.find_element("css selector", "#item-list details summary")
    fold.click()
    assert "Carry 9" in browser.find_element("css selector", "#item-list details[open]").text


@pytest.mark.parametrize("width", [390, 1280])
def test_in_chromium_nothing_overflows_is_fetched_or_complains(browser: Any, tmp_path: Path, width: int) -> None:
    for found in (comparison(), hostile(), comparison(1, 0), empty()):
        page = opened(browser, found, tmp_path, width)
        browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        wide = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide[0] <= wide[1]
        assert browser.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
        assert asked <= {page.as_uri(), "data:,"}
        assert (
            browser.execute_script("return [...document.querySelectorAll('img, iframe, #item-list script')].length")
            == 0
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium_text_has_contrast(browser: Any, tmp_path: Path, scheme: str) -> None:
    opened(browser, comparison(), tmp_path)
    reduced(browser, scheme)
    pairs = browser.execute_script(
        """
        const solid = (e) => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } };
        const found = new Map();
        const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) {
            const e = walk.currentNode.parentElement;
            if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest('svg, script, option')) continue;
            const pair = getComputedStyle(e).color + '|' + solid(e);
            found.set(pair, e.outerHTML.slice(0, 80));
        }
        return [...found];
        """
    )

    def luminance(colour: str) -> float:
        linear = [
            (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
            for v in (int(c) / 255 for c in re.findall(r"\d+", colour)[:3])
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(pairs) > 10
    for pair, where in pairs:
        light, dark = sorted(map(luminance, pair.split("|")), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (pair, where)  # WCAG 2.2, success criterion 1.4.3
