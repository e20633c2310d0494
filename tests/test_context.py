"""How a run is carried out: its device is checked at once, and progress goes to whoever asked."""

import dataclasses

import pytest
import torch

from netclone.errors import ArgumentError
from netclone.runtime.context import Run, RunFields


def test_a_device_is_known_when_the_run_is_made():
    assert Run().place is None and Run(device="cpu").place == torch.device("cpu")
    with pytest.raises(ArgumentError, match="device"):
        Run(device="gpu")


def test_what_is_found_is_kept_in_memory_where_no_file_keeps_it():
    begun = Run().begun()
    assert begun.found is begun.findings and begun.begun() is begun


def test_progress_goes_to_whoever_asked():
    told = []
    Run(progress=lambda *step: told.append(step)).tell("mask", 1, 2)
    Run().tell("mask", 2, 2)
    assert told == [("mask", 1, 2)]


def test_every_field_can_be_given_by_itself():
    assert {field.name for field in dataclasses.fields(Run) if field.init} == RunFields.__annotations__.keys()
