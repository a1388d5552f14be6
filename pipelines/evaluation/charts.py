"""Charts as SVG text, for a page that loads nothing: curves with bands, and points with error bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 36
COLORS = ("#3b6fd4", "#d9603b", "#2f9e6e", "#a05cc9", "#c79a12", "#d14a87", "#3aa3b5", "#7b8794")
MOST_POINTS = 200  # of a curve; more than that and neighbours are averaged
TICKS = 5


@dataclass(frozen=True)
class Curve:
    """A line over seconds with its interval; None where there is no value. color: its place in COLORS."""

    label: str
    color: int
    seconds: Sequence[float]
    mean: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]


@dataclass(frozen=True)
class Point:
    """A point with an interval in y; None bounds draw none."""

    label: str
    color: int
    x: float
    y: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis over [low, high], drawn from `begin` to `end` in pixels."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return nice_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        candidates = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        found = [value for value in candidates if self.low <= value <= self.high]
        return [value for value in found if len(found) <= 2 * TICKS or math.log10(value) % 1 < 1e-9]


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers within [low, high]."""
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]


def curves_chart(curves: Sequence[Curve], unit: str) -> str:
    """Curves over seconds, each in a band of its interval; the vertical axis spans what is drawn."""
    thinned = [_thinned(curve) for curve in curves]
    values = [value for one in thinned for line in (one.mean, one.low, one.high) for value in line if value is not None]
    seconds = [second for one in thinned for second in one.seconds]
    x = _axis([*seconds, 0.0], LEFT, WIDTH - RIGHT, snug=True)
    y = _axis(values, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, "seconds", unit)]
    parts += [_band(one, x, y) for one in thinned]
    parts += [_line(one, x, y) for one in thinned]
    return _svg(parts, f"{unit} over seconds: {', '.join(one.label for one in curves)}")


def points_chart(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points with error bars over a logarithmic horizontal axis, each with its label beside it."""
    bounds = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    xs = [point.x for point in points]
    x = Axis(min(xs) / 1.6, max(xs) * 1.6, LEFT, WIDTH - RIGHT, logarithmic=True)
    y = _axis(bounds, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, x_label, y_label)]
    for point in points:
        across, up = x.place(point.x), y.place(point.y)
        if point.low is not None and point.high is not None:
            ends = f'y1="{y.place(point.low):.1f}" y2="{y.place(point.high):.1f}"'
            parts.append(f'<line x1="{across:.1f}" x2="{across:.1f}" {ends} stroke="{color(point.color)}"/>')
        title = f"<title>{escape(point.label)}: {point.x:.3g}, {point.y:.3g}</title>"
        place = f'cx="{across:.1f}" cy="{up:.1f}"'
        parts.append(f'<circle {place} r="4.5" fill="{color(point.color)}">{title}</circle>')
    return _svg(parts, f"{y_label} over {x_label}")


def _axis(values: Sequence[float], begin: float, end: float, *, snug: bool = False) -> Axis:
    """An axis over the values with a little room, and never of no length."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = (low, low + 1) if snug else (low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1))
    room = 0.0 if snug else 0.06 * (high - low)
    return Axis(low - room, high + room, begin, end)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Grid lines, tick labels and axis titles."""
    parts = []
    for value in y.ticks():
        up = y.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{up + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x.ticks():
        across = x.place(value)
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:.4g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f'transform="translate(11 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text class="axis" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _band(curve: Curve, x: Axis, y: Axis) -> str:
    rows = zip(curve.seconds, curve.low, curve.high, strict=True)
    known = [(second, low, high) for second, low, high in rows if low is not None and high is not None]
    if len(known) < 2:
        return ""
    upper = [f"{x.place(second):.1f},{y.place(high):.1f}" for second, _, high in known]
    lower = [f"{x.place(second):.1f},{y.place(low):.1f}" for second, low, _ in reversed(known)]
    return f'<polygon points="{" ".join(upper + lower)}" fill="{color(curve.color)}" opacity="0.14"/>'


def _line(curve: Curve, x: Axis, y: Axis) -> str:
    known = [(at, value) for at, value in zip(curve.seconds, curve.mean, strict=True) if value is not None]
    places = [f"{x.place(at):.1f},{y.place(value):.1f}" for at, value in known]
    title = f"<title>{escape(curve.label)}</title>"
    paint = f'stroke="{color(curve.color)}"'
    if len(places) == 1:
        across, up = places[0].split(",")
        return f'<circle cx="{across}" cy="{up}" r="3.5" fill="{color(curve.color)}">{title}</circle>'
    return f'<polyline points="{" ".join(places)}" fill="none" {paint} stroke-width="2">{title}</polyline>'


def _thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points: means over neighbours."""
    group = -(-len(curve.seconds) // MOST_POINTS)
    if group <= 1:
        return curve

    def mean(values: Sequence[float | None]) -> list[float | None]:
        chunks = (values[first : first + group] for first in range(0, len(values), group))
        known = ([value for value in chunk if value is not None] for chunk in chunks)
        return [sum(chunk) / len(chunk) if chunk else None for chunk in known]

    seconds = [second for second in mean(curve.seconds) if second is not None]
    return Curve(curve.label, curve.color, seconds, mean(curve.mean), mean(curve.low), mean(curve.high))


def _svg(parts: Sequence[str], description: str) -> str:
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description, quote=True)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{"".join(parts)}</svg>'
