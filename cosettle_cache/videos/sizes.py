"""Image sizes: the rules by which a protocol names them, and what a patch allows.

A rule is text, so it can stand in a protocol, a fingerprint and on the command line; out come pixels.
"""

from __future__ import annotations

from cosettle_cache.core.errors import InputError, UsageError
from cosettle_cache.core.types import Grid


def resolve_size(rule: str, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) in pixels that a size rule gives for frames of `height` x `width`.

    Rules: `480x880` (exactly, aspect ignored), `native`, `short:480/64` (short side 480, long side floored
    to a multiple of 64, as DINO does), `long:880/64` (long side 880, short side floored, as T-CORE does for
    VIP).
    """
    if rule == "native":
        return height, width
    side, _, numbers = rule.rpartition(":")
    try:
        first, second = (int(number) for number in numbers.split("/" if side else "x"))
    except ValueError as error:
        raise _bad_rule(rule) from error
    if min(first, second) < 1 or side not in ("", "short", "long"):
        raise _bad_rule(rule)
    return (first, second) if not side else _fit(side, first, second, height, width)


def _bad_rule(rule: str) -> UsageError:
    return UsageError(
        f"{rule!r} is no size", wanted="HEIGHTxWIDTH, native, short:S/M or long:S/M", found=rule
    )


def _fit(side: str, target: int, multiple: int, height: int, width: int) -> tuple[int, int]:
    anchor = min(height, width) if side == "short" else max(height, width)
    other = max(height, width) if side == "short" else min(height, width)
    fitted = other * target // anchor // multiple * multiple
    return (target, fitted) if height == anchor else (fitted, target)


def check_grid(height: int, width: int, patch: int, what: str) -> Grid:
    """Return the grid of an image size in pixels; raise `InputError` if the patch does not divide it."""
    if height >= patch and width >= patch and height % patch == 0 and width % patch == 0:
        return Grid(height // patch, width // patch)
    near = f"{max(height // patch, 1) * patch}x{max(width // patch, 1) * patch}"
    raise InputError(
        f"{what} would be encoded at a size that is not a multiple of the patch",
        wanted=f"multiples of {patch} pixels",
        found=f"{height}x{width}",
        hint=f"--size {near}",
    )
