"""Text from files, made safe to show: it must not control a terminal or a page."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
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


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known: the closest known ones, or nothing.

    Examples
    --------
    >>> suggestion("herron", ["heron", "ibis"]), suggestion("?", ["heron"])
    ("; did you mean 'heron'?", '')
    """
    near = [f"'{other}'" for other in difflib.get_close_matches(word, list(known), n=3, cutoff=0.8)]
    return f"; did you mean {', '.join([*near[:-2], ' or '.join(near[-2:])])}?" if near else ""


def _is_plain(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or letter in _JOINERS
