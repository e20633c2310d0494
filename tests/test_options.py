"""Options of a constructor and configurations of images are plain data, or refused by name."""

import pytest

from netclone.errors import ArchiveError
from netclone.files.options import checked_config, checked_options, is_of_weights


def test_plain_options_pass_and_tuples_become_lists():
    given = {"depth": 3, "drop": 0.5, "pool": "avg", "norm": None, "sizes": ((1, 2), [3])}
    assert checked_options(given) == {**given, "sizes": [[1, 2], [3]]}


@pytest.mark.parametrize(
    "name", ["pretrained", "weights", "checkpoint_path", "cache_dir", "custom_load", "hf_hub_id", "device", "dtype"]
)
def test_nothing_says_where_weights_or_code_come_from(name):
    assert is_of_weights(name)
    with pytest.raises(ArchiveError, match=name):
        checked_options({name: "x"})


@pytest.mark.parametrize(
    "value",
    [object(), {"a": 1}, b"x", "a\nb", "x" * 1001, 1e9, float("nan"), float("inf"), [0] * 101, [[[[[1]]]]]],
    ids=lambda value: repr(value)[:20],
)
def test_an_option_that_is_no_small_literal_is_refused_by_name(value):
    with pytest.raises(ArchiveError, match="options: .*size"):
        checked_options({"size": value})


@pytest.mark.parametrize("options", [[], None, {3: 1}, {"a b": 1}, {f"o{n}": n for n in range(101)}], ids=str)
def test_options_that_are_no_keywords_are_refused(options):
    with pytest.raises(ArchiveError, match="options: "):
        checked_options(options)


def test_a_configuration_is_what_timm_reads():
    given = {"input_size": [3, 96, 96], "mean": [0.5], "std": [0.2], "label_names": ["owl", "wren"]}
    assert checked_config(given) == given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("input_size", value) for value in ([96, 96], [3, 0, 96], (3, 96, 96), [3.0, 96, 96])),
        *(("std", [0.0]), ("mean", "x"), ("crop_pct", -1), ("interpolation", "magic"), ("label_names", ["a\nb"])),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(name, value):
    with pytest.raises(ArchiveError, match=name):
        checked_config({name: value})


@pytest.mark.parametrize("config", [[], None, {"url": "x"}])
def test_what_is_no_configuration_is_refused(config):
    with pytest.raises(ArchiveError, match="config: "):
        checked_config(config)
