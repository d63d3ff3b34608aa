"""JSON bodies are read strictly: one reading of every byte, or a problem that says what is wrong."""

import pytest

from app.api.bodies import DEEPEST, parse_json, read_json
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


async def read(content_type: str) -> tuple[bytes, object]:
    """Read a body that says that it is of this type."""

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"{}"}

    return await read_json({"type": "http", "headers": [(b"content-type", content_type.encode("latin-1"))]}, receive)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON; Charset=UTF-8",
        'application/json;charset="utf-8"',
        "application/merge-patch+json",
        "application/json; profile=x;",
    ],
)
async def test_a_type_that_says_json_in_utf_8_is_read(content_type: str) -> None:
    assert await read(content_type) == (b"{}", {})


@pytest.mark.sabotage(
    path="app/api/bodies.py", take_out='name.strip().partition("*")[0] == "charset"', put='name.strip() == "charset"'
)
@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/json",
        "application/jsonl",
        "application/json/x",
        "application/json, text/plain",
        "application/json; charset=",
        "application/json; charset=utf-16",
        "application/json; charset=utf-8; charset=utf-16",
        "application/json; charset*=utf-8''utf-16",
        "application/json; charset*=utf-8''utf-8; charset*0=x",
        "application/json; charset*0=utf; charset*1=-16",
        "application/json; charset=\xff\xfe",
    ],
)
async def test_any_other_type_is_refused_however_odd_it_is(content_type: str) -> None:
    with pytest.raises(Invalid) as caught:
        await read(content_type)
    assert caught.value.code == "unsupported_media_type"
