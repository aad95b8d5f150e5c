"""Scenes to pixels: every shape is an inside test on [-1, 1]^2, sampled 5 x 5 times a pixel."""

from __future__ import annotations

import math

import numpy as np

from ldm.scenes.outlines import OUTLINES, inside
from ldm.scenes.world import BACKGROUNDS, CANVAS, COLOURS, Scene, Thing

SAMPLES = 5
"""Samples a pixel and axis: 25 levels of coverage at an edge."""

Plane = np.ndarray


def draw(scene: Scene) -> np.ndarray:
    """Draw a scene, anti-aliased: uint8 RGB of shape (64, 64, 3)."""
    picture = np.empty((CANVAS, CANVAS, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        alpha = coverage(thing)[..., None]
        picture += alpha * (np.asarray(COLOURS[thing.kind.colour], dtype=float) - picture)
    return np.rint(picture).astype(np.uint8)


def coverage(thing: Thing) -> np.ndarray:
    """Share of each pixel that the object covers: float64 in [0, 1], shape (64, 64)."""
    alpha = np.zeros((CANVAS, CANVAS))
    reach = math.ceil(thing.radius) + 1
    left, top = (max(0, int(centre) - reach) for centre in (thing.x, thing.y))
    right, bottom = (min(CANVAS, int(centre) + reach + 1) for centre in (thing.x, thing.y))
    steps = (np.arange(CANVAS * SAMPLES) + 0.5) / SAMPLES
    u = (steps[left * SAMPLES : right * SAMPLES] - thing.x) / thing.radius
    v = (steps[top * SAMPLES : bottom * SAMPLES] - thing.y) / thing.radius
    covered = _inside(thing.kind.shape, *np.meshgrid(u, v))
    rows, columns = bottom - top, right - left
    share = covered.reshape(rows, SAMPLES, columns, SAMPLES).mean(axis=(1, 3))
    alpha[top:bottom, left:right] = share
    return alpha


def _inside(shape: str, u: Plane, v: Plane) -> Plane:
    if shape in OUTLINES:
        return inside(shape, u, v)
    return _INSIDE[shape](u, v)


def _circle(u: Plane, v: Plane) -> Plane:
    return u**2 + v**2 <= 1


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(abs(u), abs(v)) <= 0.9


def _triangle(u: Plane, v: Plane) -> Plane:
    return (v <= 0.85) & (abs(u) <= (v + 0.88) / 1.73)


def _star(u: Plane, v: Plane) -> Plane:
    """Five-pointed, a point up; inner radius 0.42 of the outer."""
    angle = np.arctan2(u, -v) % (2 * math.pi / 5)
    angle = np.minimum(angle, 2 * math.pi / 5 - angle)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    tip = (1.0, 0.0)
    notch = (0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5))
    return (notch[0] - tip[0]) * (y - tip[1]) - (notch[1] - tip[1]) * (x - tip[0]) >= 0


def _cross(u: Plane, v: Plane) -> Plane:
    near, far = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    return (far <= 0.98) & (near <= 0.32)


def _ring(u: Plane, v: Plane) -> Plane:
    distance = u**2 + v**2
    return (distance <= 1) & (distance >= 0.52**2)


def _heart(u: Plane, v: Plane) -> Plane:
    x, y = u * 1.16, -v * 1.1 + 0.1
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0


def _crescent(u: Plane, v: Plane) -> Plane:
    return (u**2 + v**2 <= 1) & ((u - 0.5) ** 2 + v**2 >= 0.72**2)


_INSIDE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
}
