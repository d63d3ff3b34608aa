"""Signed strings and cursors: only ours open, only for their purpose, and garbage is refused rather than raised."""

import base64
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import Invalid
from app.core.signing import BadSignature, Signer
from app.scaling.paging import Cursors

SECRET = b"s" * 64
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@given(json_values)
def test_what_was_signed_opens_again_and_is_safe_in_a_url(value: Any) -> None:
    text = Signer(SECRET, "cursor").sign(value)
    assert Signer(SECRET, "cursor").open(text) == value
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@pytest.mark.sabotage(
    path="app/core/signing.py", take_out="if not hmac.compare_digest(mac, self._mac(body)):", put="if not mac:"
)
@given(json_values, st.data())
def test_a_changed_string_is_refused(value: Any, data: st.DataObject) -> None:
    signer = Signer(SECRET, "cursor")
    content = bytearray(raw(signer.sign(value)))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(BadSignature):
        signer.open(base64.urlsafe_b64encode(content).decode())


@given(st.text(max_size=2000) | st.binary(max_size=200).map(lambda b: base64.urlsafe_b64encode(b).decode()))
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(BadSignature):
        Signer(SECRET, "cursor").open(text)


@pytest.mark.sabotage(
    path="app/core/signing.py", take_out="hashlib.blake2b(purpose.encode(), key", put='hashlib.blake2b(b"", key'
)
def test_a_string_for_one_purpose_is_refused_for_another() -> None:
    text = Signer(SECRET, "cursor").sign(1)
    for stranger in (Signer(SECRET, "consistency token"), Signer(b"t" * 64, "cursor")):
        with pytest.raises(BadSignature):
            stranger.open(text)


@pytest.mark.sabotage(path="app/scaling/paging.py", take_out="if found != _mark(scope):", put="if found is None:")
def test_a_cursor_of_another_list_is_refused() -> None:
    cursors = Cursors(SECRET)
    rows = list(range(21))
    cursor = cursors.page("orders of ada", rows, 20, key=lambda row: row, item=str).next_cursor
    assert cursors.open("orders of ada", cursor) == 19
    with pytest.raises(Invalid) as refusal:
        cursors.open("orders of alan", cursor)
    assert (refusal.value.code, refusal.value.fields[0].pointer) == ("invalid_cursor", "query/cursor")


@given(st.text(max_size=300))
def test_a_cursor_that_is_garbage_is_refused_as_invalid(text: str) -> None:
    with pytest.raises(Invalid):
        Cursors(SECRET).open_id("products", text)


@given(st.lists(st.uuids(), unique=True, max_size=50), st.integers(1, 10))
def test_pages_show_each_row_once_and_end(rows: list[UUID], limit: int) -> None:
    cursors = Cursors(SECRET)
    ordered, cursor = sorted(rows), None
    shown: list[UUID] = []
    for _ in range(len(rows) + 1):
        after = cursors.open_id("list", cursor)
        rest = [row for row in ordered if after is None or row > after][: limit + 1]
        page = cursors.page("list", rest, limit, key=str, item=lambda row: row)
        assert len(page.items) <= limit
        shown += page.items
        cursor = page.next_cursor
        if cursor is None:
            break
    assert shown == ordered


def test_the_cursor_of_the_longest_search_is_one_that_we_take_back() -> None:
    cursors = Cursors(SECRET)
    scope = f"search {'🙂' * 200}"
    cursor = cursors.page(
        scope, [1, 2], 1, key=lambda _: [0.1234567890123, str(UUID(int=2**127))], item=str
    ).next_cursor
    assert cursors.open(scope, cursor)[0] == 0.1234567890123
