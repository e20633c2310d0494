"""The choices that arguments allow, as types, and the one check of them.

Python's signatures and the command line use the same types. This module does not import torch, so ``--help`` and shell
completion stay fast.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from netclone.errors import ArgumentError

Budget = Literal["channels", "params", "macs", "latency"]
"""What ``keep`` is a share of: the units of every channel group, the parameters, the MACs, or the time."""

Method = Literal["local", "taylor", "magnitude", "random", "cka"]
"""How the channels to keep are chosen; see :func:`netclone.localize`."""

Sharing = Literal["global", "uniform"]
"""How a budget is divided among channel groups: by score and cost, or the same share of each."""

Search = Literal["early", "all"]
"""Which target positions are tried: from the deepest up until validation stops improving, or all."""

Effort = Literal["fast", "balanced", "best"]
"""How long a source is distilled into a clone."""

MixedPrecision = Literal["no", "bf16"]
"""The precisions of training, by accelerate's names; float16 is missing because it would need loss scaling."""

StoredDtype = Literal["bf16", "int8"]
"""What a file may hold weights in, beside their own dtype: bfloat16, or int8 with a scale for each row."""

Ablation = Literal["adapter_start", "target_stream", "calibration"]
"""Parts of the method that can be left out, for ablations."""


def words(choice: Any) -> tuple[str, ...]:
    """The words of a choice, in the order of messages and help.

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
        If it is none of them; the message names the argument, ``what``, and the words.

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


def check_number(number: object, what: str, least: int) -> None:
    """Raise unless ``number`` is an integer >= ``least``."""
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ArgumentError(f"{what}: got {number!r}, expected a whole number from {least} on")


def check_finite(number: object, what: str) -> float:
    """The number as a float; raises unless it is a finite one.

    Examples
    --------
    >>> check_finite(2, "bias")
    2.0
    """
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ArgumentError(f"{what}: got {number!r}, expected a finite number")
    return float(number)
