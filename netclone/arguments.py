"""The words of each closed choice that a caller has, as types, and the one check of them.

Python's signatures and the command line use the same types. Importing them is cheap: no torch, so that ``--help`` and
completion in the shell stay quick.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from netclone.errors import ArgumentError

Budget = Literal["channels", "params", "macs"]
"""What ``keep`` is a share of: the units of every channel group, the parameters, or the multiply-accumulates."""

Method = Literal["local", "taylor", "magnitude", "random"]
"""How the channels to keep are chosen; see :func:`netclone.localize`."""

Sharing = Literal["global", "uniform"]
"""How a budget is shared out among channel groups: by score and cost, or the same share of each."""

Search = Literal["early", "all"]
"""Which target positions are tried: from the deepest on until validation stops improving, or all."""

MixedPrecision = Literal["no", "bf16"]
"""What learning computes in, by accelerate's names; float16 would need its losses scaled."""

Ablation = Literal["adapter_start", "target_stream", "calibration"]
"""Parts of the method that can be left out, to see what they are worth."""


def words(choice: Any) -> tuple[str, ...]:
    """The words of a choice, in the order in which messages and help list them.

    Examples
    --------
    >>> words(Search)
    ('early', 'all')
    """
    return get_args(choice)


def check_choice(value: object, choice: Any, what: str) -> None:
    """Raise unless a value is one of the words of a choice.

    Raises
    ------
    ArgumentError
        With the argument's name, ``what``, and the words.

    Examples
    --------
    >>> check_choice("early", Search, "search")
    >>> check_choice("later", Search, "search")
    Traceback (most recent call last):
        ...
    netclone.errors.ArgumentError: search: got 'later', expected one of 'early', 'all'
    """
    if not isinstance(value, str) or value not in words(choice):
        raise ArgumentError(f"{what}: got {value!r}, expected one of {', '.join(map(repr, words(choice)))}")
