"""The drawings of a comparison's page as inline SVG: differences, trade-offs, learning curves, reliability diagrams.

Each has a title and a description in words for screen readers, and every mark has its own ``<title>``. An entry is told
apart by its label and its colour class, never by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from luthier.runs.plots import Frame, joined, nice_ticks, thin, tick_text, value_range

_COLOURS = 8
# Width of a character of a label, in drawing units.
_CHARACTER = 5.9
# Area that labels may cover per point, in square units, before only numbers are written.
_CROWDED = 12.0
_KEY = "numbers as in the table"
# Labels stay right of the vertical axis' numbers.
_AXIS = 44
_MEAN_POINTS, _SEED_POINTS = 80, 60
# Where a label may stand beside its point: (right, down, anchor), the best liked first.
_PLACES = [
    (9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 18, "middle"),
    (8, -8, "start"), (-8, -8, "end"), (8, 16, "start"), (-8, 16, "end"),
    (9, -20, "start"), (-9, -20, "end"), (9, 28, "start"), (-9, 28, "end"), (0, -24, "middle"), (0, 31, "middle"),
]  # fmt: skip
_SIGNS = {"better": " ▲ better", "worse": " ▼ worse"}
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Look:
    """How an entry is drawn.

    Attributes:
        index: its position in the comparison.
        role: its CSS classes.
        number: of a method, from 1 in the order asked for; an empty string for base and SFT.
        name: in full.
    """

    index: int
    role: str
    number: str
    name: str

    @property
    def label(self) -> str:
        """Short enough to stand in a drawing."""
        return f"{self.number} {shortened(self.name)}".strip()


@dataclass(frozen=True)
class Spot:
    """A point of a trade-off, or a difference (x only).

    Attributes:
        look: of the entry.
        x, y: in the units of the axes.
        x_span, y_span: the ends of the intervals, where they are known.
        front: whether it is on the Pareto front.
        words: all this as a sentence.
        verdict: CSS class of a difference.
    """

    look: Look
    x: float
    y: float = 0.0
    x_span: tuple[float, float] | None = None
    y_span: tuple[float, float] | None = None
    front: bool = False
    words: str = ""
    verdict: str = ""


def looks(names: Sequence[str], kinds: Sequence[str]) -> list[Look]:
    """A colour and a number for every entry; the colours come back dashed after the eighth method."""
    found: list[Look] = []
    methods = 0
    for index, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind in ("base", "sft"):
            found.append(Look(index, f"c-{kind}", "", name))
        else:
            dashed = " dashed" if methods >= _COLOURS else ""
            found.append(Look(index, f"c{methods % _COLOURS}{dashed}", str(methods + 1), name))
            methods += 1
    return found


def shortened(name: str, most: int = 24) -> str:
    """A name without its options in brackets, cut to ``most`` characters."""
    kept, depth = [], 0
    for character in name:
        depth += character == "("
        if depth == 0:
            kept.append(character)
        elif character == ")":
            depth -= 1
    return cut("".join(kept).strip() or name, most)


def cut(text: str, most: int) -> str:
    """A text of at most ``most`` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def differences(spots: Sequence[Spot], *, title: str, x_label: str) -> str:
    """One line per entry: its difference with the interval, left and right of zero; empty when there is none."""
    spots = [s for s in spots if math.isfinite(s.x)]
    if not spots:
        return ""
    ends = [0.0, *(v for s in spots for v in (s.x, *(s.x_span or ())))]
    ticks = nice_ticks(*value_range(ends))
    row, top, left, right = 34, 8, 12, 288
    height = top + row * len(spots) + 36

    def at(value: float) -> float:
        return round(left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left), 1)

    bottom = height - 34
    parts = [_opened(300, height, title, [s.words for s in spots])]
    for tick in ticks:
        x = at(tick)
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 14}" text-anchor="middle">{tick_text(tick)}</text>')
    parts.append(f'<text class="axis" x="150" y="{height - 4}" text-anchor="middle">{escape(cut(x_label, 50))}</text>')
    for i, s in enumerate(spots):
        y = top + row * i + 24
        parts.append(f'<g class="{s.verdict}"><title>{escape(s.words)}</title>')
        parts.append(
            f'<text class="name" x="{left}" y="{y - 10}">{escape(s.look.label)}{_SIGNS.get(s.verdict, "")}</text>'
        )
        if s.x_span:
            parts.append(_whisker([(at(v), y) for v in s.x_span]))
        parts.append(f'<circle class="spot front" cx="{at(s.x)}" cy="{y}" r="4.5"/></g>')
    return "".join([*parts, "</svg>"])


def trade_off(spots: Sequence[Spot], *, title: str, x_label: str, y_label: str) -> str:
    """Points with whiskers where less is better to the left and more is better to the top, the front as a line."""
    spots = [s for s in spots if math.isfinite(s.x) and math.isfinite(s.y)]
    if not spots:
        return ""
    xs = [v for s in spots for v in (s.x, *(s.x_span or ()))]
    ys = [v for s in spots for v in (s.y, *(s.y_span or ()))]
    frame = Frame.around(xs, ys, width=360, height=280, top=38)
    parts = [
        _opened(frame.width, frame.height, title, [s.words for s in spots]),
        *frame.axes(cut(f"{x_label} →", 56)),
        f'<text class="axis" x="4" y="13">{escape(cut(f"↑ {y_label}", 58))}</text>',
        f'<text class="way" x="50" y="{frame.top - 7}">↖ better</text>',
    ]
    if frame.x_range[0] < 0 < frame.x_range[1]:
        parts.append(_line("zero", [frame.at(0.0, y) for y in frame.y_range]))
    if frame.y_range[0] < 0 < frame.y_range[1]:
        parts.append(_line("zero", [frame.at(x, 0.0) for x in frame.x_range]))
    front = sorted((s for s in spots if s.front), key=lambda s: (s.x, s.y))
    if len(front) > 1:
        parts.append(_line("front", [frame.at(s.x, s.y) for s in front]))
    points = [frame.at(s.x, s.y) for s in spots]
    labels = [s.look.label for s in spots]
    places, covered = place_labels(points, labels, frame)
    if covered > _CROWDED * len(spots):
        labels = [s.look.number or s.look.label for s in spots]
        places, _ = place_labels(points, labels, frame)
        parts.append(f'<text class="tick" x="{frame.width - 12}" y="{frame.top - 7}" text-anchor="end">{_KEY}</text>')
    names = []
    for s, (cx, cy), label, (x, y, anchor) in zip(spots, points, labels, places, strict=True):
        names.append(f'<text class="name" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(label)}</text>')
        parts.append(f'<g class="{s.look.role}"><title>{escape(s.words)}</title>')
        parts += [_whisker([frame.at(v, s.y) for v in s.x_span])] if s.x_span else []
        parts += [_whisker([frame.at(s.x, v) for v in s.y_span])] if s.y_span else []
        mark = "spot front" if s.front else "spot"
        parts.append(f'<circle class="{mark}" cx="{cx}" cy="{cy}" r="5"/></g>')
    return "".join([*parts, *names, "</svg>"])


def place_labels(
    points: Sequence[tuple[float, float]], labels: Sequence[str], frame: Frame
) -> tuple[list[tuple[float, float, str]], float]:
    """(x, y, anchor) of each label, beside its point where it covers least, and the area that is covered all the same.

    Greedy, from the top of the drawing down: of the places around a point the one is taken that overlaps the labels
    placed before, the points, and the drawing's edge least.
    """
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    placed: dict[int, tuple[float, float, str]] = {}
    total = 0.0
    for i in sorted(range(len(points)), key=lambda i: points[i][1]):
        (x, y), length = points[i], _CHARACTER * len(labels[i])
        tried = []
        for rank, (right, down, anchor) in enumerate(_PLACES):
            left = x + right - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
            box = (left, y + down - 9, left + length, y + down + 3)
            outside = max(0.0, _AXIS - box[0]) + max(0.0, box[2] - frame.width + 2)
            outside += max(0.0, frame.top - box[1]) + max(0.0, box[3] - frame.height + 36)
            covered = sum(_overlap(box, other) for j, other in enumerate(taken) if j != i)
            place = (round(x + right, 1), round(y + down, 1), anchor)
            tried.append((covered + 40 * outside + rank, covered, box, place))
        _, covered, box, placed[i] = min(tried)
        total += covered
        taken.append(box)
    return [placed[i] for i in range(len(points))], total


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


@dataclass(frozen=True)
class Curve:
    """The learning curve of one seed of one entry.

    Attributes:
        look: of the entry.
        seed: of the trial.
        points: (x, y), one per record.
        whole: whether the trial went to its end, so that it counts in the mean.
    """

    look: Look
    seed: int | None
    points: Sequence[tuple[float, float]]
    whole: bool = True


def learning_curves(curves: Sequence[Curve], *, title: str, x_label: str, y_label: str) -> str:
    """Seeds thin, their mean bold; every entry is a group with ``data-curve`` so that it can be hidden."""
    entries: dict[int, list[Curve]] = {}
    for curve in curves:
        entries.setdefault(curve.look.index, []).append(curve)
    means = {i: thin(mean_curve([c.points for c in group if c.whole]), _MEAN_POINTS) for i, group in entries.items()}
    seeds = {i: [(c.seed, thin(c.points, _SEED_POINTS)) for c in group] for i, group in entries.items()}
    every = [p for i in entries for points in (means[i], *(points for _, points in seeds[i])) for p in points]
    if not every:
        return ""
    frame = Frame.around([p[0] for p in every], value_range([p[1] for p in every]), width=420, height=270, top=26)
    told = [
        f"{entries[i][0].look.name}: from {mean[0][1]:.3g} to {mean[-1][1]:.3g}" for i, mean in means.items() if mean
    ]
    parts = [
        _opened(frame.width, frame.height, title, told),
        *frame.axes(x_label),
        f'<text class="axis" x="4" y="13">{escape(y_label)}</text>',
    ]
    for i, mean in means.items():
        look, whole = entries[i][0].look, sum(c.whole for c in entries[i])
        parts.append(f'<g data-curve="{i}" class="{look.role}">')
        for seed, points in seeds[i]:
            if points and (whole != 1 or len(seeds[i]) > 1):
                parts.append(_line("seed", [frame.at(*p[:2]) for p in points], f"{look.name}, seed {seed}"))
        if mean:
            name = f"{look.name}, mean of {whole} seeds" if whole > 1 else look.name
            parts.append(_line("mean", [frame.at(*p[:2]) for p in mean], name))
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def mean_curve(seeds: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean over seeds, record by record, as far as all of them go."""
    return [
        (sum(x for x, _ in column) / len(column), sum(y for _, y in column) / len(column))
        for column in zip(*seeds, strict=False)
    ]


def reliability(bins: Sequence[tuple[float, float, float | None]], *, title: str, role: str) -> str:
    """Accuracy against confidence of each bin, with the diagonal of perfect calibration; per cent on both axes.

    Args:
        bins: (confidence, accuracy, n) of each bin.
        title: for screen readers.
        role: CSS classes of the entry.
    """
    bins = sorted((b for b in bins if math.isfinite(b[0]) and math.isfinite(b[1])), key=lambda b: b[:2])
    if not bins:
        return ""
    ticks = [0.0, 25.0, 50.0, 75.0, 100.0]
    frame = Frame((0, 100), (0, 100), ticks, ticks, width=230, height=220, top=24)
    points = [frame.at(100 * confidence, 100 * accuracy) for confidence, accuracy, _ in bins]
    words = [f"confidence {100 * c:.0f} %, right {100 * a:.0f} %" + (f" (n {n:,.0f})" if n else "") for c, a, n in bins]
    parts = [
        _opened(frame.width, frame.height, title, words),
        *frame.axes("mean confidence, %"),
        '<text class="axis" x="4" y="12">↑ right, %</text>',
        _line("diagonal", [frame.at(0, 0), frame.at(100, 100)]),
        f'<g class="{role}">',
        _line("mean", points) if len(points) > 1 else "",
    ]
    for (x, y), label in zip(points, words, strict=True):
        parts.append(f'<circle class="spot front" cx="{x}" cy="{y}" r="3.4"><title>{escape(label)}</title></circle>')
    return "".join([*parts, "</g></svg>"])


def _opened(width: int, height: int, title: str, told: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" class="chart"><title>{escape(title)}</title>'
        f"<desc>{escape('; '.join(told))}.</desc>"
    )


def _line(kind: str, points: Sequence[tuple[float, float]], label: str = "") -> str:
    title = f"<title>{escape(label)}</title>" if label else ""
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="spot front" cx="{x}" cy="{y}" r="3">{title}</circle>'
    return f'<polyline class="{kind}" points="{joined(points)}">{title}</polyline>'


def _whisker(ends: Sequence[tuple[float, float]]) -> str:
    return _line("whisker", ends)
