"""How many seconds a replica is behind: the log positions of its shard, each with the moment it was first heard of.

A replica's own clock cannot say it: it counts the time in which nothing was committed as lag, and it knows nothing of
what it has not received. Here a replica is behind since the first position that somebody has seen and it has not
replayed; also one that is cut off from its primary, and believes itself up to date, is then known to be late.
"""

from bisect import bisect_right


class Timeline:
    """Positions of one shard's log over time.

    Args:
        horizon: seconds within which lag is told exactly; a longer one is at least that long. It bounds what is kept.
    """

    def __init__(self, horizon: float) -> None:
        self._horizon = horizon
        self._positions: list[int] = []
        self._moments: list[float] = []

    @property
    def latest(self) -> int:
        """The newest position that is known, 0 if none is."""
        return self._positions[-1] if self._positions else 0

    def note(self, position: int, now: float) -> None:
        """Note that the log stood at `position` at the moment `now`; older ones than the latest say nothing new."""
        if position <= self.latest:
            return
        self._positions.append(position)
        self._moments.append(now)
        # The newest of those beyond the horizon stays: who has not replayed it is behind by at least the horizon.
        outdated = bisect_right(self._moments, now - self._horizon) - 1
        if outdated > 0:
            del self._positions[:outdated], self._moments[:outdated]

    def restart(self, position: int, now: float) -> None:
        """Forget everything and begin at `position`: another server is the primary and its log is the log now."""
        self._positions, self._moments = [position], [now]

    def behind(self, replayed: int, now: float) -> float:
        """Return for how many seconds there has been something that a replica at `replayed` does not show."""
        first_missing = bisect_right(self._positions, replayed)
        return now - self._moments[first_missing] if first_missing < len(self._positions) else 0.0
