"""What can be in a scene: shapes, colours, backgrounds, sizes, counts, relations.

A :class:`Description` says what a caption asks for; a :class:`Scene` fixes where every object
stands. Descriptions are drawn from a random generator, scenes from a description.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from ldm.scenes.outlines import OUTLINES

CANVAS = 64
"""Side of the square picture, in pixels."""

KNOWN_SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NEW_SHAPES = ("heart", "crescent")
SHAPES = KNOWN_SHAPES + NEW_SHAPES
OUTLINE = "outline"
"""In a choice of shapes: one of the made-up ones."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (50, 170, 70),
    "cyan": (60, 205, 225),
    "blue": (40, 80, 220),
    "purple": (140, 60, 190),
    "pink": (245, 130, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "grey": (128, 128, 128),
    "black": (20, 20, 20),
    "brown": (105, 70, 40),
}

SIZES: dict[str, tuple[float, float]] = {"small": (8.0, 10.0), "large": (15.0, 18.0)}
"""Radius range, in pixels, of an only object by size word; no size word means either."""
SHARED_RADIUS = (9.0, 11.0)
"""Radius range, in pixels, of an object that is not alone."""

RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = {"right of": "left of", "below": "above"}

FORMS = {"one": 0.40, "count": 0.27, "relation": 0.33}
"""What descriptions are about, and how often: one object, two or three alike, two related."""

HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "orange"),
        ("square", "purple"),
        ("triangle", "cyan"),
        ("star", "green"),
        ("cross", "pink"),
        ("ring", "yellow"),
        ("heart", "blue"),
        ("crescent", "red"),
    }
)
"""(shape, colour) pairs that no training caption names."""
HELD_OUT_RELATIONS = frozenset(
    {
        ("star", "left of", "ring"),
        ("circle", "left of", "cross"),
        ("square", "above", "triangle"),
        ("heart", "above", "circle"),
    }
)
"""(shape, relation, shape) triples, in the ``left of``/``above`` form, that no training caption
names in either direction."""


@dataclass(frozen=True)
class Kind:
    """What one object, or each of several alike, looks like."""

    shape: str
    colour: str


@dataclass(frozen=True)
class Description:
    """What a caption asks for.

    ``first`` stands ``count`` times (1 to 3); with ``relation`` there is one of it and one
    ``second``, and ``first`` is ``relation`` ``second``. ``size`` belongs to an only object.
    """

    background: str
    first: Kind
    count: int = 1
    size: str | None = None
    relation: str | None = None
    second: Kind | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The one or two kinds of object."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def form(self) -> str:
        """Which of ``FORMS`` it is."""
        if self.second is not None:
            return "relation"
        return "count" if self.count > 1 else "one"

    @property
    def is_known(self) -> bool:
        """Whether it asks for shapes of the known world alone."""
        return all(kind.shape in KNOWN_SHAPES for kind in self.kinds)

    @property
    def has_new_shape(self) -> bool:
        """Whether it asks for a shape that ``tiny`` never saw."""
        return any(kind.shape in NEW_SHAPES for kind in self.kinds)

    @property
    def held_out_pair(self) -> bool:
        """Whether it names a held-out (shape, colour)."""
        return any((kind.shape, kind.colour) in HELD_OUT_PAIRS for kind in self.kinds)

    @property
    def held_out_relation(self) -> bool:
        """Whether it names a held-out relation, in either direction."""
        if self.second is None:
            return False
        a, b, relation = self.first.shape, self.second.shape, self.relation or ""
        if relation in MIRRORED:
            a, b, relation = b, a, MIRRORED[relation]
        return (a, relation, b) in HELD_OUT_RELATIONS

    @property
    def held_out(self) -> bool:
        """Whether no training caption may say this."""
        return self.held_out_pair or self.held_out_relation


@dataclass(frozen=True)
class Thing:
    """One object in place: centre and radius (half of the larger extent) in pixels."""

    kind: Kind
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    background: str
    things: tuple[Thing, ...]


def describe(
    rng: random.Random, shapes: tuple[str, ...], forms: Mapping[str, float] = FORMS
) -> Description:
    """Draw a description over ``shapes``, of forms in these shares.

    Held-out combinations are among the draws; the caller keeps or drops them.
    """
    background = rng.choice(tuple(BACKGROUNDS))
    first = _kind(rng, shapes)
    form = form_at(rng.random(), forms)
    if form == "one":
        return Description(background, first, size=rng.choice((None, *SIZES)))
    if form == "count":
        return Description(background, first, count=rng.choice((2, 3)))
    second = first
    while second == first:
        second = _kind(rng, shapes)
    return Description(background, first, relation=rng.choice(RELATIONS), second=second)


def _kind(rng: random.Random, shapes: tuple[str, ...]) -> Kind:
    shape = rng.choice(shapes)
    if shape == OUTLINE:
        shape = rng.choice(tuple(OUTLINES))
    return Kind(shape, rng.choice(tuple(COLOURS)))


def form_at(point: float, forms: Mapping[str, float]) -> str:
    """The form at a point in [0, 1) of the shares laid end to end."""
    ends = accumulate(forms.values())
    return next((form for form, end in zip(forms, ends, strict=True) if point < end), "relation")


def lay_out(description: Description, rng: random.Random) -> Scene:
    """Put the described objects on the canvas: whole, apart, and in the asked relation."""
    if description.second is not None:
        things = _related(description, rng)
    elif description.count > 1:
        things = _scattered(description, rng)
    else:
        low, high = SIZES[description.size or rng.choice(tuple(SIZES))]
        radius = rng.uniform(low, high)
        things = (Thing(description.first, *_free_spot(radius, rng), radius),)
    return Scene(description.background, things)


def _free_spot(radius: float, rng: random.Random) -> tuple[float, float]:
    low, high = radius + 2, CANVAS - radius - 2
    return rng.uniform(low, high), rng.uniform(low, high)


def _scattered(description: Description, rng: random.Random) -> tuple[Thing, ...]:
    while True:
        radii = [rng.uniform(*SHARED_RADIUS) for _ in range(description.count)]
        spots = [_free_spot(radius, rng) for radius in radii]
        apart = all(
            max(abs(spots[i][0] - spots[j][0]), abs(spots[i][1] - spots[j][1]))
            >= radii[i] + radii[j] + 3
            for i in range(len(spots))
            for j in range(i)
        )
        if apart:
            return tuple(
                Thing(description.first, x, y, radius)
                for (x, y), radius in zip(spots, radii, strict=True)
            )


def _related(description: Description, rng: random.Random) -> tuple[Thing, ...]:
    """Two objects along the relation's axis, at most 6 pixels out of line across it."""
    assert description.second is not None
    radii = [rng.uniform(*SHARED_RADIUS) for _ in range(2)]
    near = rng.uniform(radii[0] + 2, CANVAS / 2 - radii[0] - 1)
    far = rng.uniform(max(CANVAS / 2 + radii[1] + 1, near + sum(radii) + 3), CANVAS - radii[1] - 2)
    across = rng.uniform(max(radii) + 5, CANVAS - max(radii) - 5)
    shift = rng.uniform(-3, 3)
    along_across = [(near, across + shift), (far, across - shift)]
    kinds = [description.first, description.second]
    if description.relation in MIRRORED:
        kinds.reverse()
    horizontal = description.relation in ("left of", "right of")
    return tuple(
        Thing(kind, *(spot if horizontal else spot[::-1]), radius)
        for kind, spot, radius in zip(kinds, along_across, radii, strict=True)
    )
