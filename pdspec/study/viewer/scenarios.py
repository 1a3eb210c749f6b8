"""Two prompts that show both ends: text that a drafter foresees, and text that it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A text to continue. ``seed`` and ``temperature`` make it come out the same every time; ``drafter`` and ``tree``
    are those that show it best, where none are asked for."""

    name: str
    title: str
    text: str
    temperature: float
    drafter: str
    tree: str
    seed: int = 7


GEOMETRY = '''import math


def circle_area(radius):
    """Return the area of a circle."""
    return math.pi * radius ** 2


def circle_circumference(radius):
    """Return the circumference of a circle."""
    return 2 * math.pi * radius


def sphere_volume(radius):
    """Return the volume of a sphere."""
    return'''

DETECTIVE = """The clock in the hall had stopped at eleven minutes past four, and nobody in the house would say who \
had last wound it. Inspector Marlow put her ear to the case. Behind the still pendulum something small was caught, and \
when she drew it out"""

SCENARIOS = (
    Scenario(
        name="geometry", title="a geometry function, foreseen from those above it (n-gram)", text=GEOMETRY,
        temperature=0.0, drafter="ngram", tree="chain(4)",
    ),
    Scenario(
        name="detective", title="a stopped clock, full of surprises (EAGLE-3)", text=DETECTIVE, temperature=0.9,
        drafter="eagle3", tree="dynamic(4,3,8)",
    ),
)  # fmt: skip
