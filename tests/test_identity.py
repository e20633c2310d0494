"""What counts as the same computation in another process, and what does not."""

import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from netclone.runtime.identity import identity

STRENGTH = 2.0


def scaled(images, generator, by=1.0):
    return images * by


def strengthened(images, generator):
    return images * STRENGTH


def scaler(by):
    def scale(images, generator):
        return images * by

    return scale


class Scaler:
    def __init__(self, by):
        self.by = by

    def __call__(self, images, generator):
        return images * self.by

    def method(self, images, generator):
        return images + self.by


def examples():
    """Pairs of values that compute the same, made twice."""
    return {
        "nothing": None,
        "function": scaled,
        "lambda": lambda images, generator: images + 1,
        "partial": functools.partial(scaled, by=2.0),
        "another partial": functools.partial(scaled, by=3.0),
        "closure": scaler(2.0),
        "another closure": scaler(3.0),
        "object": Scaler(2.0),
        "another object": Scaler(3.0),
        "method": Scaler(2.0).method,
        "module": nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False).apply(lambda m: nn.init.ones_(m.weight)),
        "transform": v2.RandomHorizontalFlip(0.5),
        "another transform": v2.RandomHorizontalFlip(0.25),
        "tensor": torch.arange(3),
        "array": np.arange(3),
        "list": [1, "a", {"b": (2.0, None)}],
        "set": {"b", "a"},
        "generator": torch.Generator().manual_seed(3),
    }


def test_the_same_computation_is_the_same_and_no_other_is():
    first, second = ({name: identity(value) for name, value in examples().items()} for _ in range(2))
    assert first == second
    assert len(set(first.values())) == len(first)


def test_it_is_the_same_in_another_process():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_identity import examples, identity; "
        "print(*(f'{n}={identity(v)}' for n, v in examples().items()), sep=chr(10))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sys.path.insert(0, "tests")
    try:
        from test_identity import examples as as_imported
    finally:
        sys.path.pop(0)
    assert out.stdout.split("\n")[:-1] == [f"{name}={identity(value)}" for name, value in as_imported().items()]


def test_what_a_function_reads_from_its_module_counts(monkeypatch):
    before = identity(strengthened)
    monkeypatch.setitem(strengthened.__globals__, "STRENGTH", 3.0)
    assert identity(strengthened) != before


def test_what_cannot_be_told_is_unlike_anything_else():
    """An open file holds a place that no text stands for: such a run begins from the start."""
    with open(__file__) as file:
        assert identity(file) != identity(file)
        assert identity(functools.partial(scaled, by=file)) != identity(functools.partial(scaled, by=file))


@pytest.mark.parametrize("make", [lambda: [], lambda: {}])
def test_a_value_within_itself_has_an_end(make):
    found = []
    for _ in range(2):
        value = make()
        value.append(value) if isinstance(value, list) else value.update(own=value)
        found.append(identity(value))
    assert found[0] == found[1]
