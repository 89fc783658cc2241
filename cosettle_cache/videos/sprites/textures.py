"""Textures drawn with numpy: coloured noise, stripes, checks, dots and cells, each from a random generator.

Out come square tiles, RGB float32 from 0 to 1, in two colours that differ in brightness.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float, Float32
from numpy.random import Generator

#: Pixels per side of a tile.
TILE = 192

Tile = Float32[np.ndarray, "side side 3"]
Picture = Float32[np.ndarray, "height width 3"]
Colour = Float32[np.ndarray, "3"]
Pattern = Float[np.ndarray, "side side"]


def plain(colour: tuple[float, float, float]) -> Tile:
    """Return a tile of one colour (red, green, blue from 0 to 1)."""
    return np.full((TILE, TILE, 3), colour, np.float32)


def sprite_texture(rng: Generator, hue: float) -> Tile:
    """Return a vivid tile around `hue` (0 to 1): any pattern, its two colours far apart in brightness."""
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng)
    dark = _colour(hue + rng.uniform(-0.04, 0.04), rng.uniform(0.7, 1.0), rng.uniform(0.25, 0.5))
    light = _colour(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.35, 0.8), rng.uniform(0.8, 1.0))
    return _grained(_blend(pattern, dark, light), rng, 0.10)


def background_texture(rng: Generator, hue: float, height: int, width: int) -> Picture:
    """Return a muted texture of the given size: large patches of two colours under a finer pattern."""
    side = max(height, width)
    patches = _noise(rng, side, cells=int(rng.integers(4, 8)), octaves=6)
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](rng).astype(np.float32)
    detail = cv2.resize(pattern, (side, side), interpolation=cv2.INTER_LINEAR)
    dark = _colour(hue, rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.35))
    light = _colour(hue + rng.uniform(-0.2, 0.2), rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.85))
    return _grained(_blend(0.65 * patches + 0.35 * detail, dark, light), rng, 0.2)[:height, :width]


def _colour(hue: float, saturation: float, value: float) -> Colour:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _blend(pattern: Pattern, dark: Colour, light: Colour) -> Tile:
    return np.asarray(dark + pattern[..., None].astype(np.float32) * (light - dark))


def _grained(tile: Tile, rng: Generator, amount: float) -> Tile:
    grain = _noise(rng, len(tile), cells=len(tile) // 16, octaves=2)[..., None]
    return np.clip(tile * (1 + amount * (2 * grain - 1)), 0, 1).astype(np.float32)


def _noise(rng: Generator, side: int, cells: int, octaves: int) -> Pattern:
    """Value noise from 0 to 1: random grids, each twice as fine and half as strong as the one before."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        grid = rng.random((cells * 2**octave, cells * 2**octave), dtype=np.float32)
        total += cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = np.percentile(total, (1, 99))
    return np.asarray(np.clip((total - low) / (high - low), 0, 1))


def _coordinates(rng: Generator) -> tuple[Pattern, Pattern]:
    """Return a rotated, slightly warped pair of coordinates in pixels."""
    angle = rng.uniform(0, np.pi)
    row, col = np.mgrid[:TILE, :TILE].astype(np.float32)
    row = row + 9 * _noise(rng, TILE, cells=4, octaves=1)
    col = col + 9 * _noise(rng, TILE, cells=4, octaves=1)
    return row * np.cos(angle) + col * np.sin(angle), col * np.cos(angle) - row * np.sin(angle)


def _soft_step(wave: Pattern) -> Pattern:
    return np.clip(0.5 + 2.5 * wave, 0, 1)


def _clouds(rng: Generator) -> Pattern:
    return _noise(rng, TILE, cells=int(rng.integers(6, 11)), octaves=3)


def _stripes(rng: Generator) -> Pattern:
    along, _ = _coordinates(rng)
    return _soft_step(np.sin(2 * np.pi * along / rng.uniform(16, 30)))


def _checks(rng: Generator) -> Pattern:
    along, across = _coordinates(rng)
    period = rng.uniform(27, 42)
    return _soft_step(np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period))


def _dots(rng: Generator) -> Pattern:
    along, across = _coordinates(rng)
    period = rng.uniform(20, 30)
    wave = np.cos(2 * np.pi * along / period) + np.cos(2 * np.pi * across / period)
    return _soft_step(wave - 0.5)


def _cells(rng: Generator) -> Pattern:
    """Cobbles: every pixel takes the shade of the nearest of some points, dark where two are equally near."""
    points = rng.uniform(0, TILE, (int(rng.integers(40, 80)), 2)).astype(np.float32)
    seeds = np.full((TILE, TILE), 255, np.uint8)
    seeds[points[:, 0].astype(int), points[:, 1].astype(int)] = 0
    _, nearest = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    shade = rng.uniform(0.35, 1.0, int(nearest.max()) + 1)[nearest].astype(np.float32)
    seams = cv2.morphologyEx(nearest.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    return np.where(seams, np.float32(0), shade)


_PATTERNS: tuple[Callable[[Generator], Pattern], ...] = (_clouds, _stripes, _checks, _dots, _cells)
