"""A recipe checks itself when it is made, and says itself as plain data."""

import dataclasses
import json

import pytest

from netclone.cloning.recipe import EFFORTS, PARTS, Recipe, RecipeFields
from netclone.errors import ArgumentError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("search", value) for value in ("some", None)),
        *(("method", "best"), ("mixed_precision", "fp8")),
        *(("without", value) for value in ("calibration", ["calibrations"])),
        *(("epochs", value) for value in (-1, 1.5, True)),
        *(("batch_size", 0), ("distill_steps", -1), ("mask_steps", 0.5)),
        *(("effort", value) for value in ("most", None)),
        *(("validation", value) for value in (0, 1, float("nan"), "0.2", None)),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ArgumentError, match=field):
        Recipe(**{field: value})


def test_the_order_of_what_is_left_out_does_not_matter():
    assert Recipe(without=PARTS) == Recipe(without=[*PARTS[::-1], PARTS[0]])


def test_its_facts_are_plain_data_of_every_field():
    recipe = Recipe(epochs=3, augment=lambda images, generator: images)
    facts = recipe.facts()
    assert facts.keys() == {field.name for field in dataclasses.fields(Recipe)} == RecipeFields.__annotations__.keys()
    assert json.loads(json.dumps(facts))["epochs"] == 3


def test_an_effort_gives_the_steps_unless_a_recipe_gives_its_own():
    assert [Recipe(effort=effort).steps for effort in EFFORTS] == list(EFFORTS.values())
    assert Recipe(effort="fast", distill_steps=7).steps == 7
    assert dataclasses.replace(Recipe(), effort="best").steps == EFFORTS["best"]


def test_facts_hold_the_steps_that_are_meant():
    given = Recipe(distill_steps=EFFORTS["balanced"])
    assert given.facts() == Recipe().facts() != Recipe(effort="fast").facts()


def test_facts_differ_where_augmentations_compute_something_else():
    mirrored, moved = (Recipe(augment=a) for a in (lambda x, g: x.flip(3), lambda x, g: x.roll(1, 3)))
    assert mirrored.facts() != moved.facts() != Recipe().facts()
