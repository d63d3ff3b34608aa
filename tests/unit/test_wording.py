"""What people type becomes MariaDB's boolean mode: signs, quotes, alternatives, word forms, and nothing of its own."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.scaling.dialect.wording import boolean_query


def forms(query: str) -> list[set[str]]:
    """Return the forms of each word that is asked for."""
    return [set(group.split()) for group in re.findall(r"\(([^()]*)\)", query)]


@pytest.mark.sabotage(
    path="app/scaling/dialect/wording.py",
    take_out='    forms = [word, *(f"{stem}{ending}" for ending in _ENDINGS)]',
    put="    forms = [word]",
)
@pytest.mark.parametrize(
    ("typed", "written"),
    [("lamps", "lamp"), ("lamp", "lamps"), ("berries", "berry"), ("candles", "candle"), ("folded", "folding")],
)
def test_a_word_is_looked_for_in_its_regular_forms(typed: str, written: str) -> None:
    (asked,) = forms(boolean_query(typed))
    assert {typed, written} <= asked


def test_all_words_must_be_there_and_a_minus_forbids() -> None:
    assert [term[0] for term in re.findall(r"[+-]\(", boolean_query("desk lamp -oak"))] == ["+", "+", "-"]


def test_quotes_make_a_phrase_of_exactly_these_words() -> None:
    assert boolean_query('"Desk  Lamp" -"of oak"') == '+"desk lamp" -"of oak"'


def test_or_parts_alternatives() -> None:
    chair, lamp = boolean_query("chair"), boolean_query("lamp -oak")
    assert boolean_query("chair OR lamp -oak") == f"({chair}) ({lamp})"


@pytest.mark.parametrize("text", ["", "the", "of the", "or", '""', "-", "***", "or or"])
def test_what_counts_for_nothing_asks_for_nothing(text: str) -> None:
    assert boolean_query(text) == ""


@given(st.text(max_size=200))
def test_nothing_that_is_typed_is_taken_for_an_operator(text: str) -> None:
    outside = re.sub(r'"[\w ]*"', "", boolean_query(text))
    assert re.fullmatch(r"[\w +()-]*", outside)
    assert outside.count("(") == outside.count(")")
