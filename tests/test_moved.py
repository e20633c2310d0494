"""Modules can be imported by the names that they had before they were in rooms, for a while."""

import importlib
import subprocess
import sys

import pytest

import netclone
from netclone.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_same_module_with_a_warning(old):
    sys.modules.pop(f"netclone.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"netclone.{old} is now netclone.{MOVED[old]}"):
        module = importlib.import_module(f"netclone.{old}")
    assert module is importlib.import_module(f"netclone.{MOVED[old]}")
    assert module.__name__ == module.__spec__.name == f"netclone.{MOVED[old]}"
    sys.modules.pop(f"netclone.{old}")


def test_what_three_modules_had_is_in_the_rooms_of_their_names():
    code = "from netclone.channels import channel_groups; from netclone.reporting import report; import netclone"
    code += "; from netclone.cloning import clone; assert clone is netclone.clone"
    code += "; assert channel_groups is netclone.channel_groups; print(report.__module__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout == "netclone.reporting.page\n", done.stderr


@pytest.mark.filterwarnings("ignore:netclone.injecting is now:DeprecationWarning")
def test_the_public_names_of_injecting_are_under_its_old_name():
    """Two of them are in another module now."""
    module = importlib.import_module("netclone.injecting")
    for name in ("GraftedModule", "clones", "inject", "remove"):
        assert getattr(module, name) is getattr(netclone, name)
    sys.modules.pop("netclone.injecting")


def test_no_other_name_is_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("netclone.utils")
