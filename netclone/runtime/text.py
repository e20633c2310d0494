"""Text from files, made safe to show: it must not control a terminal or a page."""

from __future__ import annotations

import unicodedata
from typing import TypeGuard

MOST_LETTERS = 10_000
_JOINERS = "\u200c\u200d"  # used within words of Persian or Hindi, and in emoji


def is_plain_text(value: object) -> TypeGuard[str]:
    """Whether a value is text of moderate length without control characters, lone surrogates or line breaks.

    Characters that change the writing direction, and those of zero width, count as control characters, except for the
    two joiners, which some languages need.

    Examples
    --------
    >>> is_plain_text("heron"), is_plain_text("\\x1b[2J"), is_plain_text("\\u202ecte")
    (True, False, False)
    """
    return isinstance(value, str) and len(value) <= MOST_LETTERS and all(_is_plain(letter) for letter in value)


def as_plain_text(value: str) -> str:
    """The text with a question mark for each character that is not plain, cut to a moderate length.

    Examples
    --------
    >>> as_plain_text("a\\x07b")
    'a?b'
    """
    return "".join(letter if _is_plain(letter) else "?" for letter in value[:MOST_LETTERS])


def _is_plain(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in _JOINERS
