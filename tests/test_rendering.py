"""Pages from templates: escaped, strict, and numbers as people read them."""

import base64
import hashlib

import jinja2
import pytest

from netclone.reporting.rendering import digest, percent, points, render, short, times


def test_a_fact_that_is_missing_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("zoo/table.html.jinja", facts={})


def test_the_digest_is_that_of_the_script():
    script = "alert('ä')"
    want = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    assert digest(script) == f"sha256-{want}"


def test_numbers_as_people_read_them():
    assert [percent(share) for share in (0.0, 0.12345, 1.0, None)] == ["0.0%", "12.3%", "100.0%", "\N{EN DASH}"]
    assert [points(0.5, before) for before in (0.25, 0.75, 0.5, None)] == ["+25.0", "\N{MINUS SIGN}25.0", "±0.0", ""]
    assert [short(n) for n in (0, 999, 1000, 12_345, 999_499, 999_500, 10**9)] == [
        *("0", "999", "1.00 k", "12.3 k", "999 k", "1.00 M", "1.00 G"),
    ]
    assert times((48, 8, 8)) == "48 \N{MULTIPLICATION SIGN} 8 \N{MULTIPLICATION SIGN} 8"
