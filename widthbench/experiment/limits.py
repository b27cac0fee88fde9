"""What a cell may take: plain data, which suites say and engines keep to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a cell may take.

    Attributes:
        time_s: Seconds from when its turn has come (waiting for another process that computes the
            same cell or trains its base does not count); no limit if None.
        memory_mib: Resident memory of its process and all that it started, in MiB; no limit if
            None.
    """

    time_s: float | None = None
    memory_mib: float | None = None

    def roomier(self, other: Limits) -> Limits:
        """What suits both of two suites that share a cell."""
        pairs = ((self.time_s, other.time_s), (self.memory_mib, other.memory_mib))
        return Limits(
            *(None if None in pair else max(p for p in pair if p is not None) for pair in pairs)
        )
