"""The checker of histories refuses each history that cannot have happened, and none that can."""

from dataclasses import replace

import pytest

from deploy.chaos.history import NO_ANSWER, Call, End, Span, violations


def write(session: str, at: float, based: int, value: str, status: int = 200) -> Call:
    return Call("write", session, "ada", at, at + 0.5, status, based, based + 1 if status == 200 else 0, value)


def read(session: str, at: float, version: int, value: str) -> Call:
    return Call("read", session, "ada", at, at + 0.5, 200, version=version, value=value)


def order(key: str, at: float, identifier: str, status: int = 202) -> Call:
    return Call("order", "buyer", key, at, at + 0.5, status, value=identifier if status == 202 else "")


def look(at: float, steps: int, status: str) -> Call:
    return Call("look", "buyer", "order-1", at, at + 0.5, 200, version=steps, value=status)


RIGHT = (
    write("a", 0, 1, "x"),
    read("b", 1, 2, "x"),
    write("b", 2, 1, "y", status=412),
    write("b", 3, 2, "z", status=NO_ANSWER),
    read("b", 4, 3, "z"),
    read("a", 5, 3, "z"),
    order("key-1", 0, "", status=NO_ANSWER),
    order("key-1", 1, "order-1"),
    order("key-1", 2, "order-1"),
    look(3, 1, "processing"),
    look(4, 2, "confirmed"),
)
END = End({"ada": (3, "z")}, {"buyer": [("order-1", "confirmed")]})


def test_a_history_that_can_have_happened_is_no_violation() -> None:
    assert violations(RIGHT, END) == []


def test_a_write_without_an_answer_may_have_had_no_effect() -> None:
    assert violations((write("a", 0, 1, "x"), write("b", 3, 2, "z", status=503)), End({"ada": (2, "x")}, {})) == []


def test_another_session_may_read_what_was_there_before() -> None:
    assert violations((write("a", 0, 1, "x"), read("b", 1, 1, "")), End({"ada": (2, "x")}, {})) == []


@pytest.mark.parametrize(
    ("wrong", "end", "said"),
    [
        pytest.param(
            [write("a", 0, 1, "x"), read("a", 1, 1, "")], END, "a wrote version 2 of ada and then got", id="own write"
        ),
        pytest.param([read("b", 6, 2, "x")], END, "b saw version 3 of ada and then version 2", id="going back"),
        pytest.param([read("c", 6, 2, "other")], END, "got 'other' as version 2", id="two values"),
        pytest.param(
            [write("a", 6, 3, "u"), write("b", 6.1, 3, "v")],
            replace(END, profiles={"ada": (4, "v")}),
            "got 'v' as version 4 of ada, which was 'u'",
            id="lost update",
        ),
        pytest.param(
            [replace(write("a", 6, 3, "u"), version=5)],
            replace(END, profiles={"ada": (5, "u")}),
            "changed version 3 of ada and got version 5",
            id="skipped version",
        ),
        pytest.param([write("a", 6, 3, "u")], END, "version 4 of ada was acknowledged", id="lost write"),
        pytest.param(
            [], replace(END, profiles={"ada": (3, "q")}), "in the end version 3 of ada is 'q'", id="other end"
        ),
        pytest.param([order("key-1", 3, "order-2")], END, "was answered with order order-1 and", id="doubled order"),
        pytest.param([order("key-2", 3, "order-1")], END, "two keys were answered with order order-1", id="shared"),
        pytest.param([order("key-2", 3, "order-2")], END, "order order-2 was acknowledged and is lost", id="lost"),
        pytest.param([order("key-2", 3, "", status=503)], END, "1 keys never got an answer", id="open key"),
        pytest.param(
            [],
            replace(END, orders={"buyer": [("order-1", "confirmed"), ("order-2", "confirmed")]}),
            "order order-2 was placed by no key",
            id="ghost order",
        ),
        pytest.param(
            [],
            replace(END, orders={"buyer": [("order-1", "confirmed")] * 2}),
            "order order-1 is listed 2 times",
            id="listed twice",
        ),
        pytest.param([look(5, 3, "rejected")], END, "went from confirmed back to rejected", id="way back"),
        pytest.param([look(5, 1, "confirmed")], END, "went from confirmed back to confirmed", id="lost step"),
        pytest.param(
            [], replace(END, orders={"buyer": [("order-1", "processing")]}), "is processing in the end", id="no end"
        ),
    ],
)
def test_a_history_that_cannot_have_happened_is_refused(wrong: list[Call], end: End, said: str) -> None:
    assert any(said in violation for violation in violations([*RIGHT, *wrong], end)), violations([*RIGHT, *wrong], end)


def test_while_nothing_keeps_what_a_session_has_seen_only_its_token_binds_it() -> None:
    weak = [Span(5.9, 7)]
    back = read("b", 6, 2, "x")
    own = write("b", 5, 3, "u")
    end = replace(END, profiles={"ada": (4, "u")})
    assert violations([*RIGHT, back], END, weak) == []
    assert violations([*RIGHT, own, back], end, weak) == []
    assert violations([*RIGHT, own, replace(back, bound=True)], end, weak) == [
        "b wrote version 4 of ada and then got version 2"
    ]
    assert violations([*RIGHT, own, replace(back, begun=8, ended=9)], end, weak) != []
