"""Values computed when first asked for, in stores that may be forked at any moment."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

__all__ = ["cached_property"]

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property(functools.cached_property):  # noqa: N801
        """As in the standard library, without the lock that Python 3.11 holds while it computes.

        A child forked at that moment would wait for it for ever. Two threads may compute a value twice.
        """

        def __get__(self, instance, owner=None):
            """Return the value, computed unless it is there."""
            if instance is None:
                return self
            if self.attrname not in instance.__dict__:
                instance.__dict__[self.attrname] = self.func(instance)
            return instance.__dict__[self.attrname]
