"""Text in files: what steers a terminal or a page is refused; what languages need is not."""

import sys
import unicodedata

import pytest

from netclone.runtime.text import MOST_LETTERS, as_plain_text, is_plain_text


@pytest.mark.parametrize(
    "text", ["", "grey heron", "Graureiher, ä", "鷺", "क्\u200dष", "👩\u200d🔬", "[red]<b>&*_`$", "a\xa0b"]
)
def test_text_of_any_language_is_plain(text):
    assert is_plain_text(text) and as_plain_text(text) == text


def test_whatever_steers_what_shows_it_is_not():
    steering = [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs")
    ]
    left = [letter for letter in [*steering, "\u2028", "\u2029"] if is_plain_text(f"a{letter}b")]
    assert left == ["\u200c", "\u200d"]
    assert {"\x1b", "\n", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800"} <= set(steering)
    assert as_plain_text("\x1b[2J\u202e") == "?[2J?"


def test_what_is_too_long_or_no_text_is_not_plain():
    assert is_plain_text("x" * MOST_LETTERS) and not is_plain_text("x" * (MOST_LETTERS + 1))
    assert not any(map(is_plain_text, (None, 7, b"x", ["x"])))
    assert len(as_plain_text("x" * 2 * MOST_LETTERS)) == MOST_LETTERS
