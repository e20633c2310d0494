"""What a run wrote down is there again after a kill, line by line."""

import json

import pytest

from netclone.runtime.journal import Journal


def test_whole_lines_are_kept_and_of_a_key_the_last(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'{"key": "a", "x": 1}\nrubbish\n{"key": "a", "x": 2}\n{"key": "b", "x"')
    journal = Journal(path)
    assert journal.records == {"a": {"key": "a", "x": 2}}
    journal.append({"key": "b", "x": 3})
    assert Journal(path).records["b"]["x"] == 3


@pytest.mark.parametrize("cut", range(1, 22))
def test_wherever_a_kill_cut_the_last_line_the_next_begins_anew(tmp_path, cut):
    path = tmp_path / "runs.jsonl"
    line = json.dumps({"key": "b", "x": 2}).encode() + b"\n"
    path.write_bytes(b'{"key": "a", "x": 1}\n' + line[:-cut])
    Journal(path).append({"key": "c", "x": 3})
    assert list(Journal(path).records) == ["a", "c"]


def test_without_a_file_it_is_empty_and_makes_one_only_to_write(tmp_path):
    journal = Journal(tmp_path / "runs.jsonl")
    assert journal.records == {} and not journal.path.exists()
    journal.append({"key": "a"})
    assert journal.path.read_bytes() == b'{"key": "a"}\n'


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b'[]\n{"x": 1}\n3\n\xff\n{"key": "a"}\n')
    assert Journal(path).records == {"a": {"key": "a"}}
