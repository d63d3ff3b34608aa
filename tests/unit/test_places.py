"""Places for streams: so many for one caller, so many in all, each given back."""

from contextlib import ExitStack
from uuid import uuid4

import pytest

from app.api.events import Places
from app.core.errors import RateLimited, Unavailable
from app.core.settings import EventSettings

PLACES = EventSettings(streams=3, streams_per_caller=2)


@pytest.mark.sabotage("app/api/events.py", "self._taken.total() >= self.settings.streams", "False")
def test_an_instance_has_so_many_streams_and_a_caller_so_many_of_them() -> None:
    places, one, other = Places(PLACES), uuid4(), uuid4()
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(places.taken(one))
        with pytest.raises(RateLimited), places.taken(one):
            pass
        held.enter_context(places.taken(other))
        with pytest.raises(Unavailable) as full, places.taken(uuid4()):
            pass
        assert (full.value.code, full.value.retry_after) == ("streams_full", 5)
    assert not places._taken


def test_a_stream_that_ends_badly_gives_its_place_back_too() -> None:
    places = Places(PLACES)
    with pytest.raises(ZeroDivisionError), places.taken(uuid4()):
        raise ZeroDivisionError
    assert not places._taken
