"""The day, the person and the log that files name: what may stand in them, and what is refused."""

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netclone.errors import ArchiveError, ArgumentError
from netclone.files.provenance import Event, checked_by, event, log_from_data, log_to_data, today

ONE = Event("inject", "herons", "2026-11-26", "herons.safetensors", "0" * 64, "Ada", "0.1.0")


def test_the_day_is_that_of_source_date_epoch(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert today() == "1970-01-01"
    assert event("remove", "x", "").date == "1970-01-01"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(ArgumentError, match="SOURCE_DATE_EPOCH: the environment says 'soon'"):
        today()


@pytest.mark.parametrize("by", ["/home/ada", "C:\\ada", "file:/ada", "a\nb", "\x1b[2J", "x" * 201, "\u202ecte"])
def test_who_is_a_name_in_one_line(by):
    with pytest.raises(ArgumentError, match="by: got"):
        checked_by(by)


def test_nobody_is_named_who_did_not_say_so(monkeypatch):
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody")
    assert checked_by(None) == "" and event("inject", "x", "").by == ""


def test_a_log_comes_back():
    log = (ONE, replace(ONE, action="remove", file="", by=""))
    assert log_from_data(log_to_data(log)) == log
    assert len(log_to_data([ONE] * 10_001)) == 10_000


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*vars(ONE), "more"]), inner, max_size=7)
        ),
        max_leaves=12,
    )
)
def test_anything_else_is_an_archive_error(value):
    with contextlib.suppress(ArchiveError):
        assert all(isinstance(one, Event) for one in log_from_data(value))
