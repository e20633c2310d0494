"""Classes by name: what a network records, what is given, and what is said where a name is not clear."""

import numpy as np
import pytest
import timm
import torch

import netclone
from netclone.errors import ArgumentError
from netclone.graph.class_names import ClassNames, check_listed
from netclone.learning.data import check_classes, names_for


@pytest.mark.parametrize("classes", [3, "ibis", np.int64(3), torch.tensor(3), ["ibis"]])
def test_one_class_may_come_alone(classes):
    assert check_classes(classes, 4, ClassNames.given(["crow", "grey heron", "gull", "ibis"], "source")) == (3,)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("ibiss", "classes: the source has no class 'ibiss'; did you mean 'ibis'"),
        (["heron"], "no class 'heron'; did you mean 'grey heron'"),
        (["ibis", "zebra"], "no class 'zebra'; it has 'crow', 'grey heron', 'gull', 'ibis', 'crane'"),
        ("crane", "'crane' names 2 classes of the source, columns 4, 5; give the column"),
        (["ibis", "IBIS"], "classes: 3 is given 2 times"),
    ],
)
def test_names_that_are_not_clear_are_refused_with_near_ones(classes, message):
    names = ClassNames.given(["crow", "grey heron", "gull", "ibis", "crane", "crane"], "source")
    with pytest.raises(ArgumentError, match=message):
        check_classes(classes, 6, names)


def test_names_of_imagenet_are_known_and_two_meanings_of_one_are_refused():
    names = ClassNames.of(timm.create_model("test_resnet"), "source")
    assert check_classes(["tench", "n01443537"], 1000, names) == (0, 1)
    with pytest.raises(ArgumentError, match="'crane' names 2 classes of the source, columns 134, 517"):
        check_classes("crane", 1000, names)


def test_the_names_of_all_columns_are_texts_one_for_each():
    check_listed((), 3, "source_names")
    check_listed(["a", "b"], 2, "source_names")
    for names in ("ab", ["a", 1], ["a"]):
        with pytest.raises(ArgumentError, match="source_names: .*for each"):
            check_listed(names, 2, "source_names")


def test_classes_keep_the_names_that_they_were_given_by():
    assert names_for(["heron", " ibis"], ()) == ("heron", "ibis")
    assert names_for(["heron", 7], ()) == names_for(7, ()) == names_for(None, ()) == ()
    assert names_for(["heron"], ["grey"]) == ["grey"]


def test_clone_takes_names_of_classes_and_of_labels_on_both_sides():
    source, target = (timm.create_model("test_resnet", num_classes=count) for count in (3, 2))
    images, names = torch.randn(12, 3, 32, 32), ["heron", "ibis", "crow"]
    old = images, ["ant", "bee"] * 6
    said = {"source_names": names, "target_names": ["ant", "bee"], "at": "input", "method": "magnitude"}
    data = images, [names[n % 3] for n in range(12)]
    module = netclone.clone(source, target, data, classes="ibis", target_data=old, distill_steps=0, epochs=1, **said)
    assert (module.classes, module.class_names) == ((1,), ("ibis",))
    grafted = netclone.inject(target, module)
    assert netclone.evaluate(grafted, (images, ["ibis"] * 12)).old is None
    with pytest.raises(netclone.DataError, match="target_data: labels of batch 0: the target has no class 'ants'"):
        netclone.clone(source, target, data, classes="ibis", target_data=(images, ["ants"] * 12), **said)
    with pytest.raises(ArgumentError, match="classes: 'ibis' is a name, .* or pass .* as source_names="):
        netclone.clone(source, target, data, classes="ibis")
    with pytest.raises(ArgumentError, match="source_names: 2 names for 3 columns"):
        netclone.clone(
            source,
            target,
            (images, torch.arange(12) % 3),
            classes=1,
            target_data=(images, torch.arange(12) % 2),
            source_names=["a", "b"],
        )
