"""render(template, **facts): fill an HTML template of this package; every fact is escaped."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from typing import Any


def render(template: str, **facts: Any) -> str:
    """Fill a template, named by its path in the package. It may include others.

    Examples
    --------
    >>> "aria-sort" in render("reporting/templates/sorting.js.jinja")
    True
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def text(name: str) -> str:
        return importlib.resources.files("netclone").joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(text),
    )
    environment.filters.update(percent=percent, points=points, short=short, times=times)
    return environment.get_template(template).render(**facts)


def digest(script: str) -> str:
    """The digest of a script, with which a content security policy allows this script alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def percent(share: float | None) -> str:
    """A share in percent, or a dash if there is none.

    Examples
    --------
    >>> percent(0.9974)
    '99.7%'
    """
    return "–" if share is None else f"{100 * share:.1f}%"  # noqa: RUF001


def points(after: float | None, before: float | None) -> str:
    """The difference of two shares in points; empty if either is unknown.

    Examples
    --------
    >>> points(0.75, 0.5), points(1.0, None)
    ('+25.0', '')
    """
    if before is None or after is None:
        return ""
    change = round(100 * (after - before), 1)
    return "±0.0" if change == 0 else f"{change:+.1f}".replace("-", "\N{MINUS SIGN}")


def short(number: float) -> str:
    """A number in at most three digits and a letter.

    Examples
    --------
    >>> short(642), short(422128), short(5842511), short(999_999)
    ('642', '422 k', '5.84 M', '1.00 M')
    """
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            value = number / 10**power
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {letter}"
    return f"{number:g}"


def times(shape: tuple[int, ...]) -> str:
    """A shape in words.

    Examples
    --------
    >>> times((96,)), times(())
    ('96', 'one number')
    """
    return " × ".join(map(str, shape)) if shape else "one number"  # noqa: RUF001


def shortened(line: str, most: int) -> str:
    """A line of at most ``most`` letters, shortened in the middle.

    Examples
    --------
    >>> shortened("features.denseblock", 9)
    'feat…lock'
    """
    if len(line) <= most:
        return line
    head = (most - 1) // 2
    return f"{line[:head]}…{line[len(line) - (most - 1 - head) :]}"
