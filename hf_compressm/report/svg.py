"""Draw line and bar charts as SVG text, 360 units wide, so that their letters stay readable on a phone.

Why not matplotlib, which draws the plots of suites and benchmarks? The same pages were drawn by it, with text kept as
text, colours replaced by the page's variables and ids made unique. They look as good, light and dark, wide and on a
phone. But pages of runs with 3, 24 and 64 layers weigh 155, 422 and 2,107 kB in place of 45, 263 and 443 kB, where at
most 1,500 kB are wanted, and take 4.5, 15 and 60 s of processor time in place of 0.04, 0.12 and 0.14 s (matplotlib
3.11.2, one thread of a busy x86-64 core). And every training that writes its report or card would need matplotlib,
which is optional now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

THEME = (Path(__file__).parent / "templates" / "theme.css").read_text()
WIDTH, PLOT_HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 36
LETTER = 6.3
"""Mean width of a letter at the charts' font size."""
COLOURS = 6


@dataclass(frozen=True)
class Axis:
    """A range of values on a linear or logarithmic scale.

    Attributes:
        low, high: ends, low < high; with `log` both > 0.
        log: whether the scale is logarithmic.
        wanted: about how many ticks it has.
        whole: whether ticks are at whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    wanted: int = 5
    whole: bool = False

    @classmethod
    def around(cls, values: Sequence[float], log: bool = False, zero: bool = False, wanted: int = 5) -> Axis:
        """Return an axis that shows all finite values; with `log` those > 0, with `zero` also 0."""
        values = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = min(values), max(values)
        if log:
            low, high = 10 ** math.floor(math.log10(low) + 1e-9), 10 ** math.ceil(math.log10(high) - 1e-9)
            return cls(low, high if high > low else low * 10, True, wanted)
        low = min(low, 0.0) if zero else low
        step = _nice((high - low) / max(wanted - 1, 1) or abs(high) or 1.0)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high if high > low else low + step, False, wanted)

    @classmethod
    def upto(cls, end: float) -> Axis:
        """Return a linear axis of whole numbers from 0 to exactly `end`."""
        return cls(0.0, max(float(end), 1.0), whole=True)

    def share(self, value: float) -> float:
        """Return the place of a value, from 0 at the low end to 1 at the high end, where values beyond it are put."""
        if self.log:
            position = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            position = (value - self.low) / (self.high - self.low)
        return min(max(position, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Return the values to label, ascending."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            every = max(1, math.ceil((last - first) / self.wanted))
            powers = [10.0**power for power in range(first, last + 1, every)]
            return powers if last - first > 1 else [k * 10.0**p for p in range(first, last + 1) for k in (1, 2, 5)][:-2]
        step = max(_nice((self.high - self.low) / max(self.wanted - 1, 1)), 1.0 if self.whole else 0.0)
        return [self.low + index * step for index in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def number(value: float, digits: int = 3) -> str:
    """Return a number as text with few digits: thousands separated, powers of ten only where they are needed."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 and abs(value) < 1e7:
        return f"{value:,.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        mantissa, _, power = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
    return f"{value:.{digits}g}"


@dataclass
class Chart:
    """A chart, with a title and a description for readers who cannot see it.

    Args:
        ident: prefix of the ids in the chart, unique in the page.
        title, description: text alternatives.
        x, y: axes.
        x_label, y_label: what they show.
        bars: whether labels stand under bars in place of ticks.
    """

    ident: str
    title: str
    description: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    bars: bool = False
    _marks: list[str] = field(default_factory=list)
    _shapes: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        colour: int = 1,
        label: str | None = None,
        *,
        steps: bool = False,
        dots: bool = False,
        style: str = "",
    ) -> None:
        """Draw a line through points (x, y).

        Args:
            points: ascending in x. With a logarithmic axis, points with y <= 0 are left out.
            colour: 1 to `COLOURS`.
            label: in the legend; None for a line without one.
            steps: draw a staircase.
            dots: mark each point.
            style: further classes of the theme.
        """
        if self.y.log:
            points = [point for point in points if point[1] > 0]
        if not points:
            return
        places = [(self._x(x), self._y(y)) for x, y in points]
        path = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"]
        for x, y in places[1:]:
            path.append(f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}")
        classes = f"line c{colour} {style}".strip()
        self._shapes.append(f'<path class="{classes}" d="{"".join(path)}"/>')
        if dots or len(places) == 1:
            self.dots(points, colour)
        if label is not None:
            self._legend.append((f'<path class="{classes}" d="M0 -4H18"/>', label))

    def dots(self, points: Sequence[tuple[float, float]], colour: int, label: str | None = None) -> None:
        """Draw points without a line; arguments as for `line`."""
        circles = [(self._x(x), self._y(y)) for x, y in points if y > 0 or not self.y.log]
        self._shapes += [f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in circles]
        if label is not None:
            self._legend.append((f'<circle class="dot c{colour}" cx="12" cy="-4" r="3"/>', label))

    def mark(self, x: float, label: str | None = None, *, undone: bool = False) -> None:
        """Draw a vertical line at x. The legend has each label once."""
        kind = "mark undone" if undone else "mark"
        place = self._x(x)
        self._marks.append(f'<path class="{kind}" d="M{place:.1f} {TOP}V{TOP + PLOT_HEIGHT}"/>')
        if label is not None and all(label != text for _, text in self._legend):
            self._legend.append((f'<path class="{kind}" d="M9 -11.5V3.5"/>', label))

    def bar(self, left: float, right: float, value: float, label: str = "", colour: int = 1) -> None:
        """Draw a bar from x = left to right, from the bottom to `value`, with a label under it."""
        low, high, top = self._x(left), self._x(right), self._y(value)
        height = TOP + PLOT_HEIGHT - top
        self._shapes.append(
            f'<rect class="bar c{colour}" x="{low:.1f}" y="{top:.1f}" width="{high - low:.1f}" height="{height:.1f}"/>'
        )
        text = f'<text class="value" x="{(low + high) / 2:.1f}" y="{top - 3:.1f}">{escape(number(value))}</text>'
        self._shapes.append(text)
        place = f'x="{(low + high) / 2:.1f}" y="{TOP + PLOT_HEIGHT + 14}"'
        self._shapes.append(f'<text class="tick x" {place}>{escape(label)}</text>')

    def key(self, colour: int, label: str) -> None:
        """Add bars of a colour to the legend."""
        self._legend.append((f'<rect class="bar c{colour}" x="4" y="-9" width="10" height="10"/>', label))

    def height(self) -> int:
        """Return the height of the drawing, in its own units."""
        return TOP + PLOT_HEIGHT + BOTTOM + 16 * self._legend_rows()[1]

    def render(self) -> str:
        """Return the SVG element, for a page that has the theme's colours. `stack` makes a file."""
        legend, _ = self._legend_rows()
        names = f"{self.ident}-title {self.ident}-desc"
        parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {self.height()}" role="img" aria-labelledby="{names}">',
            f'<title id="{self.ident}-title">{escape(self.title)}</title>',
            f'<desc id="{self.ident}-desc">{escape(self.description)}</desc>',
        ]
        return "".join([*parts, *self._axes(), *self._marks, *self._shapes, *legend, "</svg>"])

    def _x(self, value: float) -> float:
        return LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return TOP + (1 - self.y.share(value)) * PLOT_HEIGHT

    def _axes(self) -> list[str]:
        right, bottom = WIDTH - RIGHT, TOP + PLOT_HEIGHT
        parts = [f'<text class="label" x="2" y="{TOP - 12}">{escape(self.y_label)}</text>']
        for tick in self.y.ticks():
            y = self._y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text class="tick y" x="{LEFT - 4}" y="{y + 3.5:.1f}">{number(tick)}</text>')
        if not self.bars:
            for tick in self.x.ticks():
                x = min(self._x(tick), WIDTH - 3 * len(number(tick)))
                parts.append(f'<text class="tick x" x="{x:.1f}" y="{bottom + 14}">{number(tick)}</text>')
        parts.append(f'<text class="label x" x="{(LEFT + right) / 2}" y="{bottom + 29}">{escape(self.x_label)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
        return parts

    def _legend_rows(self) -> tuple[list[str], int]:
        parts, row, x = [], 0, float(LEFT)
        for swatch, text in self._legend:
            width = 24 + LETTER * len(text) + 12
            if x + width > WIDTH and x > LEFT:
                row, x = row + 1, float(LEFT)
            y = TOP + PLOT_HEIGHT + BOTTOM + 10 + 16 * row
            parts.append(
                f'<g transform="translate({x:.0f} {y})">{swatch}<text class="key" x="24">{escape(text)}</text></g>'
            )
            x += width
        return parts, row + 1 if parts else 0


def stack(charts: Sequence[Chart]) -> str:
    """Return one SVG file with the charts one below the other."""
    parts, y = [], 0
    for chart in charts:
        height = chart.height()
        parts.append(f'<svg y="{y}" width="{WIDTH}" height="{height}"{chart.render().removeprefix("<svg")}')
        y += height + 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{2 * WIDTH}" height="{2 * y}">'
    return f'{head}<style>{THEME}</style><rect class="paper" width="{WIDTH}" height="{y}"/>{"".join(parts)}</svg>'
