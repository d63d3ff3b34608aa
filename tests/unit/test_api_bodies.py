"""JSON bodies are read strictly: one reading of every byte, or a problem that says what is wrong."""

import pytest

from app.api.bodies import DEEPEST, parse_json
from app.core.errors import Invalid


@pytest.mark.sabotage(path="app/api/bodies.py", take_out="object_pairs_hook=_object, ", put="")
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"",
        b"nothing",
        b'{"a": 1,}',
        b"NaN",
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        b"[" * 50_000,
        b"[" * 500 + b"]" * 500,
        b'{"a":' * 20_000,
        b"[" * (DEEPEST + 1) + b"1" + b"]" * (DEEPEST + 1),
        b"9" * 50_000,
        b'"\xff"',
        '{"a": "é"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a": 1}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_json_is_refused_as_such(body: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (rb'"\u0000"', ""),
        (rb'{"name": "A\u0000da"}', "/name"),
        (rb'{"name": "\ud83d"}', "/name"),
        (rb'{"items": [{"a": 1}, {"b": "\udc00"}]}', "/items/1/b"),
        (rb'{"a/b": {"c~d": "\u0000"}}', "/a~1b/c~0d"),
        (rb'{"attributes": {"\u0000": 1}}', "/attributes"),
    ],
)
def test_a_string_that_no_database_holds_is_named(body: bytes, pointer: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_json(body)
    assert [field.pointer for field in caught.value.fields] == [pointer]


def test_what_is_json_is_read_as_it_is() -> None:
    assert parse_json(rb'{"name": "Zo\u00eb \ud83d\ude80", "list": [1, 2.5, true, null, ""]}') == {
        "name": "Zoë 🚀",
        "list": [1, 2.5, True, None, ""],
    }
