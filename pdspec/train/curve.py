"""A loss curve as a small SVG picture: one line, axes with round numbers, no library."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 32
Points = Sequence[Sequence[float]]  # (step, loss)


def loss_svg(points: Points) -> str:
    """The picture of at least one point."""
    last = max(step for step, _ in points)
    low, high, ticks = _axis(min(loss for _, loss in points), max(loss for _, loss in points))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="11" fill="#555">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in (0, last / 2, last):
        anchor = "end" if step == last else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{step:.0f}</text>')
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2266aa" stroke-width="1.5"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 1}" text-anchor="middle">step</text>')
    return "\n".join([*parts, "</svg>\n"])


def _axis(least: float, most: float) -> tuple[float, float, list[float]]:
    """Lower and upper end, and marks between them at 1, 2 or 5 times a power of ten."""
    span = max(most - least, 1e-6)
    unit = 10.0 ** math.floor(math.log10(span / 3))
    step = unit * next(factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 5)
    first, final = math.floor(least / step), math.ceil(most / step)
    final = max(final, first + 1)
    return first * step, final * step, [round(number * step, 10) for number in range(first, final + 1)]
