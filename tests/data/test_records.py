"""Promises about the text that tells one question from another."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from jobs.data.records import comparable


@given(st.text())
def test_what_is_comparable_stays_as_it_is(text: str) -> None:
    assert comparable(comparable(text)) == comparable(text)


@given(st.text(), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_the_form_of_a_text_makes_no_difference(text: str, form: str) -> None:
    assert comparable(unicodedata.normalize(form, text)) == comparable(text)  # type: ignore[arg-type]


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)),
       st.sampled_from(["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\ufe0f", "\u202e", "\u034f"]))
def test_what_is_invisible_makes_no_difference(words: list[str], invisible: str) -> None:
    assert comparable(f" {invisible} ".join(words)) == comparable("\n".join(words)) == " ".join(words).casefold()
    assert comparable(invisible.join(words)) == comparable("".join(words))
