"""Line charts as inline SVG, made by hand: no script, no font, no file beside the page.

Colours come from the page's CSS variables, so one drawing serves light and dark. The drawing is small (360 units wide)
and scales up, so that its text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 34
_MOST_POINTS = 160
# A range this small beside its values is rounding.
_FLAT = 1e-9


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend.
        points: (x, y) in the order of x; values that are not finite are left out.
        role: CSS class of the curve: ``train``, ``eval``, ``third`` or ``fourth``.
        dots: mark every point, for curves of few points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    role: str = "train"
    dots: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about ``count`` round numbers from the last at or below ``low`` to the first at or above ``high``."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """A short number: ``12k``, ``0.25``, ``1.5e-4``."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.4g}"


def thin(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most ``most`` runs of neighbouring points."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, math.ceil(len(finite) / most))
    runs = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [
        (sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r), min(y for _, y in r), max(y for _, y in r))
        for r in runs
    ]


def _range(values: list[float]) -> tuple[float, float]:
    """The range to draw: all of it, unless a few spikes at the top would flatten the rest."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    if len(ordered) >= 50 and high - low > 4 * (usual - low) > 0:
        high = low + 1.5 * (usual - low)
    return low, high


@dataclass(frozen=True)
class Frame:
    """Where the data lie in a drawing: the ranges of the axes, their ticks, and the size, all in drawing units.

    Attributes:
        x_range, y_range: the lowest and highest value at the ends of each axis.
        x_ticks, y_ticks: the values with a label.
        width, height: of the whole drawing.
        top: room above the axes.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    width: int = WIDTH
    height: int = HEIGHT
    top: int = _TOP

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], **size: int) -> Frame:
        """Axes a little wider than finite values, with round ticks inside."""
        (x0, x1), (y0, y1) = _roomy(xs), _roomy(ys)
        x_ticks = [t for t in nice_ticks(x0, x1, 6) if x0 <= t <= x1]
        y_ticks = [t for t in nice_ticks(y0, y1) if y0 <= t <= y1]
        return cls((x0, x1), (y0, y1), x_ticks, y_ticks, **size)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The drawing's coordinates of a point; what lies above or below the axis is put on its end."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (min(max(y, y0), y1) - y0) / (y1 - y0)
        return (
            round(_LEFT + across * (self.width - _LEFT - _RIGHT), 1),
            round(self.height - _BOTTOM - up * (self.height - self.top - _BOTTOM), 1),
        )

    def axes(self, x_label: str) -> list[str]:
        """Grid lines, ticks and the horizontal axis' label."""
        parts = []
        for tick in self.y_ticks:
            _, y = self.at(self.x_range[0], tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{tick_text(tick)}</text>')
        for tick in self.x_ticks:
            x, _ = self.at(tick, self.y_range[0])
            anchor = "end" if x + 3 * len(tick_text(tick)) > self.width else "middle"
            parts.append(
                f'<text class="tick" x="{x}" y="{self.height - _BOTTOM + 15}" text-anchor="{anchor}">'
                f"{tick_text(tick)}</text>"
            )
        middle = (_LEFT + self.width - _RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle}" y="{self.height - 4}" text-anchor="middle">{escape(x_label)}</text>'
        )
        return parts


def _roomy(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or abs(high) / 10 or 1.0
    return low - room, high + room


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw: without a few spikes at the top, and with room around a constant."""
    low, high = _range(list(values))
    if high - low <= _FLAT * max(abs(low), abs(high)):  # a constant, but for rounding: draw it in the middle
        margin = abs(high) / 10 or 1.0
        low, high = low - margin, high + margin
    return low, high


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "step", from_zero: bool = False) -> str:
    """An SVG with the curves, axes, and a title for screen readers; empty when there is nothing finite to draw.

    Args:
        series: the curves; long ones are drawn as means with a band from lowest to highest.
        title: what is shown.
        x_label: under the horizontal axis.
        from_zero: whether the vertical axis starts at zero.
    """
    curves = [(s, thin(s.points)) for s in series]
    curves = [(s, points) for s, points in curves if points]
    if not curves:
        return ""
    xs = [p[0] for _, points in curves for p in points]
    low, high = value_range([y for _, points in curves for p in points for y in p[2:]])
    y_ticks = nice_ticks(min(low, 0.0) if from_zero else low, high)
    x_ticks = [t for t in nice_ticks(min(xs), max(xs), 6) if min(xs) <= t <= max(xs)] or [xs[0]]
    frame = Frame((min(xs), max(xs)), (y_ticks[0], y_ticks[-1]), x_ticks, y_ticks)
    at = frame.at

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart"><title>{escape(title)}</title>']
    parts += frame.axes(x_label)
    for one, points in curves:
        if any(p[3] > p[2] for p in points):
            edge = [at(p[0], p[3]) for p in points] + [at(p[0], p[2]) for p in reversed(points)]
            parts.append(f'<polygon class="band {one.role}" points="{joined(edge)}"/>')
        line = [at(p[0], p[1]) for p in points]
        if len(line) > 1:
            parts.append(f'<polyline class="curve {one.role}" points="{joined(line)}"/>')
        if one.dots or len(line) == 1:
            for (x, y), p in zip(line, points, strict=True):
                label = escape(f"{one.name}: {p[1]:.4g} at {x_label} {p[0]:g}")
                parts.append(f'<circle class="dot {one.role}" cx="{x}" cy="{y}" r="3"><title>{label}</title></circle>')
    return "".join([*parts, "</svg>"])


def joined(points: Sequence[tuple[float, float]]) -> str:
    """Coordinates as SVG's ``points`` wants them."""
    return " ".join(f"{x:g},{y:g}" for x, y in points)
