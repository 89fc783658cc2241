"""What is wrong with a store: one `Damage` per file and reason, with the encodings that it costs."""

from __future__ import annotations

from dataclasses import dataclass

from cosettle_cache.store.parts import VideoRows


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged file; `slot` and `encodings` where it holds tokens or says which there are."""

    file: str
    reason: str
    slot: int | None = None
    encodings: tuple[VideoRows, ...] = ()

    def lines(self) -> list[str]:
        """Return it for people: the file and what is wrong, then a line per video."""
        where = "" if self.slot is None else f" (slot {self.slot})"
        return [f"{self.file}{where}: {self.reason}", *(f"  {video}" for video in self.encodings)]
