"""Known errors: what was wanted, what was found, what to do; each with a kind and an exit code.

Everything a user can cause ends here. What is not a `CosettleError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    UNCLEAN = 4
    DAMAGED = 5
    INTERRUPTED = 130


#: A user's name and secret in a URL, of which Python's paths drop a slash. A secret may hold slashes, but
#: digits before one are a port.
_CREDENTIALS = re.compile(r"""(:/{1,2})(?:[^\s/@:"'<>]*:(?!\d{1,5}/)[^\s"'<>]*|[^\s/@"'<>]+)@""")


#: The values of parameters that sign a URL.
_SIGNATURE = re.compile(r"(?i)([?&][^\s=&]*(?:sig|token|secret|password|credential|key)[^\s=&]*=)[^\s\"'&]+")


def masked(text: str) -> str:
    """Return `text` with `***` for the credentials of every URL in it; what is told or kept passes here."""
    return _SIGNATURE.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or the name of its error when it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


class CosettleError(Exception):
    """One sentence, optionally with what was wanted, what was found and a hint.

    `details` are further lines (one per missing file, say) printed between the sentence and the hint.
    """

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(
        self,
        message: str,
        *,
        wanted: object = None,
        found: object = None,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        self.message = masked(message)
        super().__init__(self.message)
        self.wanted = None if wanted is None else masked(str(wanted))
        self.found = None if found is None else masked(str(found))
        self.hint = None if hint is None else masked(hint)
        self.details = tuple(map(masked, details))

    @property
    def summary(self) -> str:
        """The error in one line, for a table or a record."""
        wanted = f"wanted {self.wanted}, " if self.wanted is not None else ""
        return f"{self.message} ({wanted}found {self.found})" if self.found is not None else self.message

    @property
    def reason(self) -> str:
        """The error in one line with what to do about it, as the reason of a failure."""
        return f"{self.summary}; {self.hint}" if self.hint else self.summary

    def lines(self) -> list[str]:
        """Return the lines to print: the sentence, details, wanted/found, hint."""
        lines = [f"error: {self.message}", *(f"  {line}" for line in self.details)]
        said = (("  wanted: ", self.wanted), ("  found:  ", self.found), ("hint: ", self.hint))
        return lines + [f"{label}{text}" for label, text in said if text is not None]

    def __reduce__(self) -> tuple[object, ...]:
        said = {"wanted": self.wanted, "found": self.found, "hint": self.hint, "details": self.details}
        return (partial(type(self), self.message, **said), ())  # type: ignore[arg-type]


class UsageError(CosettleError):
    """The command or call cannot mean anything (unknown name, contradicting options)."""

    kind = "usage"
    exit_code = ExitCode.USAGE


class InputError(CosettleError):
    """Something given is missing or malformed."""

    kind = "input"
    exit_code = ExitCode.INPUT


class MediaError(InputError):
    """A video, frame or annotation is missing or cannot be decoded."""

    kind = "media"


class CheckpointError(InputError):
    """A weights file is missing, unsafe, of another family, or does not fit."""

    kind = "checkpoint"


class FingerprintError(InputError):
    """A store or file was made with other settings."""

    kind = "fingerprint"


class OutputError(CosettleError):
    """An output cannot be written (no space, read-only, missing folder)."""

    kind = "output"
    exit_code = ExitCode.INPUT


class RemoteError(CosettleError):
    """An object store refuses to be read, or does not answer."""

    kind = "remote"
    exit_code = ExitCode.INPUT


class ClusterError(CosettleError):
    """Worker processes or their scheduler are missing, of another version, or die."""

    kind = "cluster"
    exit_code = ExitCode.INPUT


class UncleanError(CosettleError):
    """The work finished, but not clean: some videos failed or an expectation was missed."""

    kind = "unclean"
    exit_code = ExitCode.UNCLEAN


class DamagedStoreError(CosettleError):
    """Committed bytes of a store are missing or fail their checksum."""

    kind = "damaged"
    exit_code = ExitCode.DAMAGED
