"""The words of each closed choice: one check, and no second list that could say something else."""

import inspect
import subprocess
import sys

import pytest

import netclone
from netclone import arguments
from netclone.arguments import Budget, MixedPrecision, Search, check_choice, words
from netclone.errors import ArgumentError
from netclone.learning.stepping import PRECISIONS


@pytest.mark.parametrize("value", ["later", "", None, 1, ["early"], ("early", "all"), "EARLY"])
def test_what_is_none_of_the_words_is_an_error_that_names_the_argument_and_the_words(value):
    with pytest.raises(ArgumentError) as raised:
        check_choice(value, Search, "search")
    assert str(raised.value) == f"search: got {value!r}, expected one of 'early', 'all'"


@pytest.mark.parametrize("word", words(Budget))
def test_each_word_is_taken(word):
    check_choice(word, Budget, "budget")


def test_what_learning_knows_is_what_the_choices_say():
    assert words(MixedPrecision) == tuple(PRECISIONS)


@pytest.mark.parametrize("name", ["budget", "method", "search", "mixed_precision"])
def test_what_clone_takes_when_nothing_is_said_is_one_of_the_words(name):
    choices = {"method": arguments.Method, "budget": Budget, "search": Search, "mixed_precision": MixedPrecision}
    known = {**inspect.signature(netclone.clone).parameters, **inspect.signature(netclone.Recipe).parameters}
    assert known[name].default in words(choices[name])


def test_the_choices_can_be_had_without_torch():
    code = "import sys, netclone.arguments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
