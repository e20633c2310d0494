"""Text in files: what a terminal or a page shows of it must not steer them."""

from __future__ import annotations

import unicodedata

MOST_LETTERS = 10_000
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_plain_text(value: object) -> bool:
    """Whether a value is text of moderate length without control characters, halves of characters or line ends.

    Characters that turn the direction of what follows count as control characters.

    Examples
    --------
    >>> is_plain_text("heron"), is_plain_text("\\x1b[2J"), is_plain_text("\\u202ecte")
    (True, False, False)
    """
    return isinstance(value, str) and len(value) <= MOST_LETTERS and all(_is_plain(letter) for letter in value)


def as_plain_text(value: str) -> str:
    """The text with a question mark in place of each character that is not plain, cut to a moderate length.

    Examples
    --------
    >>> as_plain_text("a\\x07b")
    'a?b'
    """
    return "".join(letter if _is_plain(letter) else "?" for letter in value[:MOST_LETTERS])


def _is_plain(letter: str) -> bool:
    return letter not in _BIDI and unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp")
