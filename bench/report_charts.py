"""Charts as SVG, for a page that is one file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.report_html import Html, element

# Okabe and Ito's colours, which are told apart without seeing red or green, and grey.
COLORS = ("#9aa3ad", "#56b4e9", "#e69f00", "#cc79a7", "#0072b2", "#009e73", "#d55e00", "#f0e442")
WIDTH, LABEL_WIDTH, VALUE_WIDTH = 1060, 350, 90
BAR_HEIGHT, ROW_HEIGHT, HEAD, FOOT = 18, 27, 30, 26
MAX_TICKS = 6
PLOT = WIDTH - LABEL_WIDTH - VALUE_WIDTH


@dataclass(frozen=True)
class Interval:
    """A value and how far it reaches.

    Attributes:
        label: What it is of.
        value: Positive.
        low: Positive, at most the value.
        high: At least the value.
    """

    label: str
    value: float
    low: float
    high: float


def draw_stacks(
    bars: Mapping[str, Mapping[str, float]], parts: Sequence[str], *, unit: str, title: str
) -> Html:
    """Return horizontal bars, each made of parts one after another.

    Args:
        bars: By label the size of each part that the bar has; at least one is positive.
        parts: Names of all parts, in their order; at most as many as there are `COLORS`.
        unit: Of the sizes.
        title: For those who cannot see it.
    """
    ticks = choose_ticks(max(sum(sizes.values()) for sizes in bars.values()))
    scale = PLOT / ticks[-1]
    colors = dict(zip(parts, COLORS, strict=False))
    shapes = [*_legend(colors), *_axis(ticks, scale, len(bars), unit)]
    for index, (label, sizes) in enumerate(bars.items()):
        top, left = HEAD + ROW_HEIGHT * index, float(LABEL_WIDTH)
        shapes.append(_label(label, top))
        for part in parts:
            width = sizes.get(part, 0.0) * scale
            name = element("title", f"{label}, {part}: {sizes.get(part, 0.0):.3g} {unit}")
            box = {"width": f"{width:.2f}", "height": BAR_HEIGHT, "fill": colors[part]}
            shape = element("rect", x=f"{left:.2f}", y=top, **box)
            if width:
                shapes.append(element("g", name, shape))
            left += width
        shapes.append(_text(f"{sum(sizes.values()):.3g} {unit}", left + 6, top + 13))
    return _drawing(shapes, len(bars), title)


def draw_intervals(intervals: Sequence[Interval], *, title: str) -> Html:
    """Return how many times as much each is, on a logarithmic axis with a line at 1."""
    low = min(1.0, *(one.low for one in intervals)) / 1.1
    high = max(1.0, *(one.high for one in intervals)) * 1.1

    def place(value: float) -> float:
        return LABEL_WIDTH + PLOT * math.log(value / low) / math.log(high / low)

    bottom = HEAD + ROW_HEIGHT * len(intervals)
    shapes = []
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if low <= tick <= high:
            ends = {"x1": f"{place(tick):.2f}", "x2": f"{place(tick):.2f}", "y2": bottom}
            width = 2 if tick == 1 else 1
            shapes.append(element("line", y1=HEAD - 6, **ends, class_="grid", stroke_width=width))
            shapes.append(_text(f"{tick:g}x", place(tick), bottom + 16, anchor="middle", of="axis"))
    for index, one in enumerate(intervals):
        top = HEAD + ROW_HEIGHT * index
        middle = top + BAR_HEIGHT // 2
        reach = {"x1": f"{place(one.low):.2f}", "x2": f"{place(one.high):.2f}"}
        name = element("title", f"{one.label}: {one.value:.3g}, {one.low:.3g} to {one.high:.3g}")
        line = element("line", **reach, y1=middle, y2=middle, stroke=COLORS[4], stroke_width=4)
        point = element("circle", cx=f"{place(one.value):.2f}", cy=middle, r=6, fill=COLORS[4])
        shapes += [_label(one.label, top), element("g", name, line, point)]
        shapes.append(_text(f"{one.value:.2f}x", place(one.high) + 10, top + 13))
    return _drawing(shapes, len(intervals), title)


def choose_ticks(largest: float) -> list[float]:
    """Return round values from 0 to at least the largest, at most `MAX_TICKS` above 0."""
    power = 10.0 ** math.floor(math.log10(largest / MAX_TICKS))
    step = next(power * part for part in (1, 2, 5, 10) if MAX_TICKS * power * part >= largest)
    return [step * index for index in range(math.ceil(largest / step - 1e-9) + 1)]


def _drawing(shapes: Sequence[Html], num_rows: int, title: str) -> Html:
    size = f"0 0 {WIDTH} {HEAD + ROW_HEIGHT * num_rows + FOOT}"
    return element("svg", element("title", title), *shapes, viewBox=size, width=WIDTH, role="img")


def _legend(colors: Mapping[str, str]) -> list[Html]:
    shapes, left = [], float(LABEL_WIDTH)
    for name, color in colors.items():
        shapes.append(element("rect", x=f"{left:.0f}", y=4, width=12, height=12, fill=color))
        shapes.append(_text(name, left + 17, 14))
        left += 34 + 7 * len(name)
    return shapes


def _axis(ticks: Sequence[float], scale: float, num_rows: int, unit: str) -> list[Html]:
    bottom, shapes = HEAD + ROW_HEIGHT * num_rows, []
    for tick in ticks:
        x = LABEL_WIDTH + tick * scale
        ends = {"x1": f"{x:.2f}", "x2": f"{x:.2f}", "y1": HEAD - 6, "y2": bottom}
        shapes.append(element("line", **ends, class_="grid"))
        shapes.append(_text(f"{tick:g} {unit}", x, bottom + 16, anchor="middle", of="axis"))
    return shapes


def _label(text: str, top: int) -> Html:
    return _text(text, LABEL_WIDTH - 8, top + 13, anchor="end")


def _text(text: str, x: float, y: float, *, anchor: str = "start", of: str | None = None) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=of)
