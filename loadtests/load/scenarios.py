"""The scenarios: how many users come when, and what they do. k6 and Locust are told the same.

The full sizes are those of a shop's days; a laptop runs a scenario's shape with fewer users in less time.
"""

from dataclasses import dataclass

from loadtests.load import LoadError


@dataclass(frozen=True, slots=True)
class Mix:
    """What a user does next, as shares of a hundred."""

    browse: int
    search: int
    purchase: int


EVERYDAY, BUSY, SALE = Mix(60, 25, 15), Mix(40, 35, 25), Mix(50, 30, 20)
FLAT = ((0.1, 1.0), (1.0, 1.0))


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario.

    Attributes:
        why: what it is to find out.
        users: at its peak, in full.
        seconds: in full.
        mix: what they do.
        shape: (share of the time by when, share of the users that are there by then), straight lines in between, from
            nobody at the beginning.
    """

    why: str
    users: int
    seconds: int
    mix: Mix
    shape: tuple[tuple[float, float], ...]

    def stages(self, users: int, seconds: float) -> list[tuple[float, int]]:
        """Return (seconds that a stage takes, users at its end) for so many users in so much time."""
        found, before = [], 0.0
        for by_when, share in self.shape:
            found.append((round((by_when - before) * seconds, 3), max(1, round(share * users))))
            before = by_when
        return found


SCENARIOS = {
    "smoke": Scenario("whether everything answers at all", 2, 30, EVERYDAY, FLAT),
    "baseline": Scenario("what an ordinary day looks like", 100, 600, EVERYDAY, FLAT),
    "peak": Scenario("the best hour of the year", 10_000, 3600, BUSY, ((0.2, 1.0), (0.8, 1.0), (1.0, 0.1))),
    "stress": Scenario(
        "where it ends, and how",
        50_000,
        3600,
        SALE,
        ((0.05, 0.2), (0.25, 0.2), (0.3, 0.4), (0.5, 0.4), (0.55, 0.7), (0.75, 0.7), (0.8, 1.0), (1.0, 1.0)),
    ),
    "soak": Scenario("what grows in a night", 500, 8 * 3600, EVERYDAY, ((0.01, 1.0), (1.0, 1.0))),
    "spike": Scenario(
        "a mail to all customers", 5_000, 900, SALE, ((0.3, 0.05), (0.35, 1.0), (0.6, 1.0), (0.65, 0.05), (1.0, 0.05))
    ),
}


def scenario(name: str) -> Scenario:
    """Return a scenario by its name.

    Raises:
        LoadError: there is none of that name.
    """
    if name not in SCENARIOS:
        raise LoadError(f"There is no scenario {name!r}; use one of: {', '.join(SCENARIOS)}.")
    return SCENARIOS[name]


def seconds_of(text: str) -> float:
    """Return the seconds that `90`, `60s`, `10m` or `8h` are.

    Raises:
        LoadError: it is none of these.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in {"s", "m", "h"} else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise LoadError(f"DURATION={text} is not a time; say 60s, 10m or 8h.")
    return seconds
