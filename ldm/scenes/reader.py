"""Reading a picture back: what a scene shows, judged from its pixels alone.

The reader is the evaluation's judge, so it shares nothing with the model. It measures the
background on the border, takes what stands out from it apart into objects, and compares each with
the eight shapes drawn by :mod:`ldm.scenes.render`. Blur preserves the area and the centroid of an
object, so these place the template, and soft edges cost little.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from ldm.scenes.render import coverage
from ldm.scenes.world import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    SHAPES,
    SIZES,
    Description,
    Kind,
    Thing,
)

BORDER = 2
"""Width of the frame that shows the background, in pixels: no layout puts an object there."""
COLOUR_TOLERANCE = 42.0
"""Largest RGB distance (0 to 442) to a named colour; the nearest two are 83 apart."""
CONTRAST = 40.0
"""RGB distance from the background below which a pixel belongs to it."""
RELATIVE_CONTRAST = 0.4
"""The same as a share of the strongest contrast nearby: keeps blurred neighbours apart."""
NEARBY = 9
"""Side of the square that ``RELATIVE_CONTRAST`` looks at, in pixels."""
SPECK = 12
"""Area in pixels below which something is decoder noise, not an object."""
DEEP = 0.75
"""How deep inside an object, as a share of its greatest depth, its colour is measured."""
FRINGE = 3.0
"""How far an object's soft edge reaches beyond its core, in pixels."""
IMPURITY = 45.0
"""RGB distance from the blend of object and background that makes a pixel impure."""
IMPURE_SHARE = 0.2
"""Impure pixels, as a share of the object's area, that make its colour unreadable."""
SMOOTHING = 1.0
"""Gaussian blur of a soft mask, in pixels: takes noise out before the comparison."""
TEMPLATE_BLURS = (1.25, 1.0, 1.5, 1.8)
"""The same for a template, most likely first: ``SMOOTHING`` and a decoder's 0 to 1.5 pixels."""
MISFIT, MISFIT_SHARE = 0.25, 0.02
"""How far, in pixels, an edge may lie from the template's on average: for the decoder's wobble,
and, as a share of the radius, for the drawing."""
SIZE_MARGIN = 1.5
"""How far beyond its range in ``SIZES`` a radius still counts, in pixels."""
APART = 8.0
"""Least distance of two related centres along the relation's axis, in pixels."""

COUNTS = (1, 2, 3)
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TOUCHING = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Seen:
    """One object found.

    ``shape`` and ``colour`` are None where unreadable. Centre and radius, in pixels, mean what
    they mean in :class:`~ldm.scenes.world.Thing` when the shape was read, else the centre and
    half of the larger side of the bounding box. ``misfit`` is how far its edge lies from the best
    template's, in pixels, on average along it.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    misfit: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; ``background`` is None where unreadable."""

    background: str | None
    things: tuple[Seen, ...]


def read_scene(pixels: np.ndarray) -> Reading:
    """Read a picture: uint8 RGB of shape (64, 64, 3)."""
    assert pixels.shape == (CANVAS, CANVAS, 3)
    assert pixels.dtype == np.uint8
    picture = pixels.astype(float)
    inner = np.zeros((CANVAS, CANVAS), dtype=bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    background = np.median(picture[~inner], axis=0)
    things = tuple(
        _read_thing(picture, background, core, region)
        for core, region in _objects(picture, background)
    )
    return Reading(_nearest(background, BACKGROUNDS), things)


def shows(pixels: np.ndarray, description: Description) -> bool:
    """Whether a picture (uint8, 64 x 64 x 3) shows what is described, all of it and no more."""
    return mismatch(read_scene(pixels), description) is None


def can_judge(description: Description) -> bool:
    """Whether it asks for nothing that the reader does not know."""
    related = description.second is not None
    return (
        description.background in BACKGROUNDS
        and all(kind.shape in SHAPES and kind.colour in COLOURS for kind in description.kinds)
        and description.count in ((1,) if related else COUNTS)
        and description.size in (None, *SIZES)
        and description.relation in (DIRECTIONS if related else (None,))
    )


def mismatch(reading: Reading, description: Description) -> str | None:
    """The first thing wrong with a picture of ``description``, in a short phrase; None if right.

    Looked at in this order: background, number of objects, shapes with colours, size, relation.
    """
    if reading.background != description.background:
        return f"background {reading.background or 'unclear'}, not {description.background}"
    wanted = Counter({description.first: description.count})
    wanted.update(description.kinds[1:])
    found = len(reading.things)
    if found != wanted.total():
        return f"{found} object{'s' * (found != 1)}, not {wanted.total()}"
    seen = Counter((thing.colour, thing.shape) for thing in reading.things)
    for kind, count in wanted.items():
        name, there = f"{kind.colour} {kind.shape}", seen[kind.colour, kind.shape]
        if there < count:
            return f"{there} {name}, not {count}" if there else f"no {name}"
    if description.size and not _has_size(reading.things[0], description.size):
        return f"not {description.size}"
    if description.second is not None and not _related(reading, description):
        return f"not {description.relation}"
    return None


def _has_size(thing: Seen, size: str) -> bool:
    low, high = SIZES[size]
    return low - SIZE_MARGIN <= thing.radius <= high + SIZE_MARGIN


def _related(reading: Reading, description: Description) -> bool:
    a, b = reading.things
    if (a.colour, a.shape) != (description.first.colour, description.first.shape):
        a, b = b, a
    right, down = DIRECTIONS[description.relation or ""]
    along = (a.x - b.x) * right + (a.y - b.y) * down
    across = abs((a.x - b.x) * down + (a.y - b.y) * right)
    return along >= APART and along > across


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str | None:
    """The name nearest to a colour (float RGB, 0 to 255), if near enough."""
    distances = {name: float(np.linalg.norm(colour - names[name])) for name in names}
    best = min(distances, key=lambda name: distances[name])
    return best if distances[best] <= COLOUR_TOLERANCE else None


def _objects(picture: np.ndarray, background: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The core and the region (core, soft edge and a rim) of each object: bool, (64, 64)."""
    contrast = np.linalg.norm(picture - background, axis=-1)
    strongest = ndimage.maximum_filter(contrast, NEARBY)
    standing_out = contrast > np.maximum(CONTRAST, RELATIVE_CONTRAST * strongest)
    labels, _ = ndimage.label(standing_out, TOUCHING)
    areas = np.bincount(labels.ravel())
    labels[areas[labels] < SPECK] = 0
    away, (rows, columns) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    owners = np.where(away <= FRINGE, labels[rows, columns], 0)
    return [(labels == label, owners == label) for label in np.unique(labels[labels > 0])]


def _read_thing(
    picture: np.ndarray, background: np.ndarray, core: np.ndarray, region: np.ndarray
) -> Seen:
    depth = ndimage.distance_transform_edt(core)
    colour = np.median(picture[depth >= DEEP * depth.max()], axis=0)
    ink = colour - background
    if np.linalg.norm(ink) < CONTRAST:  # a medley: its median colour is no pixel's
        return Seen(None, None, *_box(core), misfit=math.inf)
    share = (picture - background) @ ink / (ink @ ink) * region
    blend = background + np.clip(share, 0, 1)[..., None] * ink
    impure = region & (np.linalg.norm(picture - blend, axis=-1) > IMPURITY)
    pure = impure.sum() <= IMPURE_SHARE * core.sum()
    name = _nearest(colour, COLOURS) if pure else None
    # Smoothing comes first: clipping noise would add area.
    mask = np.clip(ndimage.gaussian_filter(share, SMOOTHING), 0, 1)
    best, misfit = _best_template(mask)
    shape = best.kind.shape
    encloses = bool((ndimage.binary_fill_holes(core) != core).any())
    if misfit <= MISFIT + MISFIT_SHARE * best.radius and encloses == (shape == "ring"):
        return Seen(shape, name, best.x, best.y, best.radius, misfit)
    return Seen(None, name, *_box(core), misfit)


def _best_template(mask: np.ndarray) -> tuple[Thing, float]:
    """The shape, placed and sized like a smoothed soft mask, that fits it best; its misfit."""
    area, x, y = _moments(mask)
    tried = []
    for shape in SHAPES:
        unit = _unit(shape)
        radius = math.sqrt(area / unit.area)
        thing = _template(shape, x - unit.x * radius, y - unit.y * radius, radius)
        cover = coverage(thing)
        tried.append((_difference(mask, cover, TEMPLATE_BLURS[0]), thing, cover))
    least, best, cover = min(tried, key=lambda one: one[0])
    least = min(least, *(_difference(mask, cover, blur) for blur in TEMPLATE_BLURS[1:]))
    return best, least / (_unit(best.kind.shape).outline * best.radius)


def _difference(mask: np.ndarray, cover: np.ndarray, blur: float) -> float:
    """Area, in pixels, by which a soft mask and blurred coverage differ."""
    return float(np.abs(mask - ndimage.gaussian_filter(cover, blur)).sum())


def _template(shape: str, x: float, y: float, radius: float) -> Thing:
    return Thing(Kind(shape, "any"), x, y, radius)


@dataclass(frozen=True)
class _Unit:
    """A shape of radius 1: area, centroid relative to the centre, length of the outline."""

    area: float
    x: float
    y: float
    outline: float


@cache
def _unit(shape: str) -> _Unit:
    middle, radius = CANVAS / 2, CANVAS / 2 - 2
    cover = coverage(_template(shape, middle, middle, radius))
    area, x, y = _moments(cover)
    # The total variation of a soft mask is the length of its outline.
    outline = float(np.hypot(*np.gradient(cover)).sum())
    return _Unit(area / radius**2, (x - middle) / radius, (y - middle) / radius, outline / radius)


def _moments(mask: np.ndarray) -> tuple[float, float, float]:
    """Area in pixels and centroid (x, y) of a soft mask: float in [0, 1], (64, 64)."""
    middles = np.arange(CANVAS) + 0.5
    area = float(mask.sum())
    return area, float(mask.sum(0) @ middles / area), float(mask.sum(1) @ middles / area)


def _box(core: np.ndarray) -> tuple[float, float, float]:
    """Centre (x, y) and half of the larger side of a mask's bounding box."""
    rows, columns = ndimage.find_objects(core.astype(int))[0]
    x, y = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
    return x, y, max(columns.stop - columns.start, rows.stop - rows.start) / 2
