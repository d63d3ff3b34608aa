"""Entity tags and preconditions, as RFC 9110 reads them."""

import pytest
from starlette.requests import Request

from app.api.representations import product_tag, profile_tag, read, version_from
from app.core.errors import Invalid, PreconditionFailed, PreconditionRequired


@pytest.mark.parametrize(
    ("tag", "version"), [('"v3"', 3), (' "v3" ', 3), ('"v12-7"', 12), (profile_tag(5), 5), (product_tag(5, 99), 5)]
)
def test_if_match_names_the_version_whatever_the_revision(tag: str, version: int) -> None:
    assert version_from(tag) == version


@pytest.mark.sabotage(
    "app/api/representations.py",
    'raise PreconditionRequired("Say which version you change: send If-Match with the ETag that you have read.")',
    "return 1",
)
def test_a_change_without_if_match_is_told_to_send_one() -> None:
    with pytest.raises(PreconditionRequired):
        version_from(None)


@pytest.mark.parametrize("tag", ["", "v3", "*", '"v3", "v4"', '"v3', "3", "W/v3"])
def test_what_is_no_entity_tag_is_refused_by_name(tag: str) -> None:
    with pytest.raises(Invalid) as caught:
        version_from(tag)
    assert caught.value.code == "invalid_if_match"
    assert caught.value.fields[0].pointer == "header/If-Match"


@pytest.mark.parametrize("tag", ['W/"v3"', '"abc"', '"v-1"', '""', '"v99999999999999999999"'])
def test_a_tag_that_nothing_of_ours_has_matches_nothing(tag: str) -> None:
    with pytest.raises(PreconditionFailed):
        version_from(tag)


@pytest.mark.sabotage(
    path="app/api/representations.py", take_out='if has(request.headers.get("if-none-match"), tag):', put="if False:"
)
@pytest.mark.parametrize(
    ("if_none_match", "status"),
    [
        (None, 200),
        ('"v3"', 304),
        ('W/"v3"', 304),
        ('"v2", "v3"', 304),
        ("*", 304),
        ('"v2"', 200),
        ("v3", 200),
        ('"v33"', 200),
    ],
)
def test_a_read_sends_nothing_that_the_caller_has(if_none_match: str | None, status: int) -> None:
    headers = [] if if_none_match is None else [(b"if-none-match", if_none_match.encode())]
    request = Request({"type": "http", "method": "GET", "headers": headers})
    answer = read(request, b"{}", tag='"v3"', caching="profile")
    assert answer.status_code == status
    assert answer.headers["etag"] == '"v3"'
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.body == (b"" if status == 304 else b"{}")
