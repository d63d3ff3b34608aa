"""Session tokens, password hashes and the phases of a process."""

import asyncio
import base64
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import Invalid, Unavailable
from app.core.settings import SessionSettings
from app.domain.profiles.passwords import Passwords
from app.domain.profiles.rules import email_key, normalise_email
from app.domain.sessions.rules import new_token, read_token
from app.scaling.lifecycle import Lifecycle, Phase

CHEAP = SessionSettings(hash_memory=8, hash_passes=1, hash_threads=1, hash_queue=1)


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    """A hasher with one thread and one place to wait."""
    made = Passwords(CHEAP)
    yield made
    made.stop()


@given(st.uuids())
def test_a_token_leads_to_its_profile_and_holds_256_random_bits(profile_id: UUID) -> None:
    token, key = new_token(profile_id)
    assert read_token(token) == (profile_id, key)
    assert token.startswith("sct_")
    assert len(base64.urlsafe_b64decode(token[4:])) == 16 + 32
    other, other_key = new_token(profile_id)
    assert other != token
    assert other_key != key


@pytest.mark.sabotage(
    "app/domain/sessions/rules.py", "return hashlib.sha256(token.encode()).hexdigest()", "return token"
)
def test_what_is_kept_of_a_token_is_its_hash() -> None:
    token, key = new_token(uuid4())
    assert key == hashlib.sha256(token.encode()).hexdigest()


@given(st.text(max_size=100) | st.text("ABCabc_-+/=", min_size=64, max_size=64).map(lambda text: "sct_" + text))
def test_what_cannot_be_a_token_is_none_and_never_raises(text: str) -> None:
    found = read_token(text)
    assert found is None or (len(text) == 68 and found[1] == hashlib.sha256(text.encode()).hexdigest())


async def test_a_password_matches_its_own_hash_and_no_other(passwords: Passwords) -> None:
    stored = await passwords.hash("correct horse")
    assert "correct horse" not in stored
    assert stored != await passwords.hash("correct horse")
    assert await passwords.matches(stored, "correct horse")
    assert not await passwords.matches(stored, "battery staple")
    assert not await passwords.matches("not a hash", "correct horse")


@pytest.mark.sabotage(
    path="app/domain/profiles/passwords.py",
    take_out="return self._hasher.verify(stored or self._nobody, password) and stored is not None",
    put="return stored is not None and self._hasher.verify(stored, password)",
)
async def test_an_unknown_address_costs_the_same_hash_as_a_wrong_password(
    passwords: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    real = passwords._hasher.verify

    def counted(stored: str, password: str) -> bool:
        verified.append(stored)
        return bool(real(stored, password))

    monkeypatch.setattr(passwords, "_hasher", type("Counting", (), {"verify": staticmethod(counted)}))
    assert not await passwords.matches(None, "whatever")
    assert not await passwords.matches(None, "nobody has this password")
    parameters = {stored.rpartition("$")[0].rpartition("$")[0] for stored in verified}
    assert len(verified) == 2
    assert parameters == {"$argon2id$v=19$m=8,t=1,p=1"}


@pytest.mark.sabotage(
    path="app/domain/profiles/passwords.py", take_out="if self._present >= self._limit:", put="if self._present < 0:"
)
async def test_past_its_bound_hashing_says_so_at_once(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(passwords, "_hasher", type("Slow", (), {"hash": staticmethod(lambda _: release.wait(10))}))
    accepted = [asyncio.create_task(passwords.hash("x")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as refusal:
        await passwords.hash("x")
    assert refusal.value.code == "hashing_busy"
    release.set()
    assert all(await asyncio.gather(*accepted))
    assert await passwords.hash("x")


@pytest.mark.parametrize("other", ["ADA@Example.COM", " ada@example.com "])
def test_two_spellings_of_one_address_count_as_one(other: str) -> None:
    assert email_key(b"s", other) == email_key(b"s", "ada@example.com")


@pytest.mark.parametrize(
    "email", ["\u0430da@example.com", "ada@exämple.com", "\uff41da@example.com", "ada@example.com\u200b"]
)
def test_an_address_that_only_looks_like_another_is_refused(email: str) -> None:
    with pytest.raises(Invalid):
        normalise_email(email)


def test_the_directory_key_of_an_address_needs_the_secret() -> None:
    key = email_key(b"s", "ada@example.com")
    assert key != email_key(b"t", "ada@example.com")
    assert key != hashlib.sha256(b"ada@example.com").hexdigest()


@pytest.mark.sabotage(
    path="app/scaling/lifecycle.py", take_out="        if phase < self.phase:", put="        if phase is None:"
)
def test_a_phase_is_only_ever_left_forwards() -> None:
    lifecycle = Lifecycle()
    assert not lifecycle.ready
    lifecycle.enter(Phase.READY)
    assert lifecycle.ready
    lifecycle.enter(Phase.DRAINING)
    assert not lifecycle.ready
    with pytest.raises(ValueError, match="from DRAINING back to READY"):
        lifecycle.enter(Phase.READY)


def test_a_process_without_a_port_says_by_a_file_that_it_is_ready(tmp_path: Path) -> None:
    file = tmp_path / "ready"
    file.touch()
    lifecycle = Lifecycle(file)
    assert not file.exists()
    lifecycle.enter(Phase.READY)
    assert file.exists()
    lifecycle.enter(Phase.DRAINING)
    assert not file.exists()
