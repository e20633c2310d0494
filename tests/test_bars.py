"""Progress bars: one for each step, made when it begins, and none without a console."""

import io

from rich.console import Console

from netclone.runtime.bars import Bars


def test_a_step_has_one_bar_however_often_it_is_told():
    with Bars(None) as bars:
        bars.tell("mask", 1, 4)
        bars.tell("mask", 3, 4)
        bars.named("fit")(2, 5)
    assert [(task.description, task.completed, task.total) for task in bars.progress.tasks] == [
        ("mask", 3, 4),
        ("fit", 2, 5),
    ]


def test_a_named_step_is_shown_before_it_has_done_anything():
    bars = Bars(None)
    bars.named("fit")
    assert [(task.completed, task.total) for task in bars.progress.tasks] == [(0, 1)]


def test_what_is_shown_and_where():
    written = io.StringIO()
    with Bars(Console(file=written, force_terminal=True, width=120)) as bars:
        bars.tell("mask", 3, 4)
    assert "mask" in written.getvalue() and "3/4" in written.getvalue()


def test_without_a_console_nothing_is_shown(capsys):
    with Bars(None) as bars:
        bars.tell("mask", 3, 4)
    assert capsys.readouterr() == ("", "")
