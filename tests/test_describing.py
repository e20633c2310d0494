"""What a graph says of itself by timm's conventions: traced, grafted, copied, and the target's own after removal."""

import copy
import functools
import itertools

import pytest
import timm
import torch
from timm.data import CustomDatasetInfo
from torch import nn

from netclone import CloneModule, CloneSpec, inject, remove, trace
from netclone.errors import CloneNameError
from netclone.graph.capturing import capture
from netclone.graph.describing import NAMES, described, widened

IMAGES = torch.zeros(2, 3, 64, 64)
LABELS = ["crow", "gull", "tern", "wren"]


def timm_target():
    model = timm.create_model("test_resnet", num_classes=4).eval()
    model.pretrained_cfg["label_names"] = list(LABELS)
    return model


class Mean(nn.Module):
    """Logits (N, K) from the mean of images."""

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(3, classes)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


@functools.cache
def clone_of(*classes, named=True):
    names = tuple(f"bird {c}" for c in classes) if named else ()
    spec = CloneSpec(classes, names, None, tuple(IMAGES.shape[1:]), 0.0, at="input")
    return CloneModule(capture(Mean(len(classes)), IMAGES), spec)


def test_a_trace_says_what_the_model_says_and_shares_nothing_with_it():
    model = timm_target()
    traced = trace(model, IMAGES)
    assert described(traced) == described(model)
    assert traced.num_classes == 4 and traced.default_cfg is traced.pretrained_cfg
    traced.pretrained_cfg["mean"] = (0, 0, 0)
    assert model.pretrained_cfg["mean"] != (0, 0, 0)


def test_a_grafted_model_has_all_classes_and_a_cfg_of_its_own():
    model = timm_target()
    before = copy.deepcopy(model.pretrained_cfg)
    grafted = inject(model, clone_of(5, 7), name="herons")
    assert grafted.num_classes == 6 == grafted(IMAGES).shape[1]
    assert grafted.pretrained_cfg == {**before, "num_classes": 6, "label_names": [*LABELS, "bird 5", "bird 7"]}
    assert grafted.default_cfg is grafted.pretrained_cfg
    assert grafted.num_features == model.num_features and grafted.feature_info == model.feature_info
    assert model.pretrained_cfg == before and model.num_classes == 4


@pytest.mark.parametrize("order", list(itertools.permutations(["a", "b", "c"])))
def test_any_order_of_removal_keeps_classes_and_columns_in_step(order):
    clones = {"a": clone_of(5, 7), "b": clone_of(1), "c": clone_of(2, 3, 4)}
    model = trace(timm_target(), IMAGES)
    before = described(model)
    grafted = model
    for name, module in clones.items():
        grafted = inject(grafted, module, name=name)
    left = dict(clones)
    for name in order:
        grafted = remove(grafted, name)
        del left[name]
        added = [f"bird {c}" for module in left.values() for c in module.classes]
        for graph in (grafted, copy.deepcopy(grafted), copy.deepcopy(copy.deepcopy(grafted))):
            assert graph.num_classes == 4 + len(added) == graph(IMAGES).shape[1]
            assert graph.pretrained_cfg["label_names"] == LABELS + added
    assert described(grafted) == before == described(model)


def test_label_names_that_would_not_be_in_step_are_left_out_and_come_back():
    grafted = inject(timm_target(), clone_of(5, 7, named=False), name="unnamed")
    assert "label_names" not in grafted.pretrained_cfg
    assert remove(grafted).pretrained_cfg["label_names"] == LABELS
    other = timm_target()
    other.pretrained_cfg["label_names"] = ["of", "another", "head", "and", "more"]
    assert "label_names" not in inject(other, clone_of(5, 7)).pretrained_cfg


def test_what_is_changed_in_a_grafted_cfg_is_kept_by_copies_and_gone_after_removal():
    grafted = inject(timm_target(), clone_of(1))
    mean = grafted.pretrained_cfg["mean"]
    grafted.pretrained_cfg["mean"] = (0.0, 0.0, 0.0)
    assert copy.deepcopy(grafted).pretrained_cfg["mean"] == (0.0, 0.0, 0.0)
    assert remove(grafted).pretrained_cfg["mean"] == mean


class Plain(nn.Module):
    """A network that knows nothing of timm."""

    def __init__(self):
        super().__init__()
        self.num_features = nn.Conv2d(3, 8, 3)  # a module under one of the names
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.num_features(x).mean((2, 3)))


def test_a_network_of_ones_own_gets_the_number_of_classes_and_nothing_else():
    model = Plain().eval()
    grafted = inject(model, clone_of(5, 7), example_inputs=IMAGES)
    assert grafted.num_classes == 6
    assert isinstance(grafted.num_features, nn.Conv2d)
    assert not hasattr(grafted, "pretrained_cfg")
    assert not hasattr(remove(grafted), "num_classes")
    assert torch.equal(remove(grafted)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_no_clone_takes_one_of_the_names(name):
    with pytest.raises(CloneNameError, match="already an attribute"):
        inject(Plain(), clone_of(1), name=name, example_inputs=IMAGES)


def test_a_target_that_only_export_takes_has_them_too():
    class Branching(nn.Module):
        """Refuses to be traced by symbols."""

        num_classes = 4

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x):
            if not isinstance(x, torch.Tensor):
                raise TypeError("tensors only")
            return self.head(x.mean((2, 3)))

    grafted = inject(Branching(), clone_of(5, 7), example_inputs=IMAGES)
    assert grafted.num_classes == 6
    assert remove(grafted).num_classes == 4


def test_a_target_of_imagenet_names_its_columns_for_timm():
    described = widened({"num_classes": 1000, "pretrained_cfg": {}}, 1000, ["heron"])
    assert described["pretrained_cfg"]["label_names"][:2] == ["tench", "goldfish"]
    assert described["pretrained_cfg"]["label_names"][-1] == "heron"
    cfg = {"label_names": {"0": "crow", "1": "gull"}, "label_descriptions": {"crow": "black", "gull": "white"}}
    wide = widened({"num_classes": 2, "pretrained_cfg": cfg}, 2, ["heron"])["pretrained_cfg"]
    assert wide["label_names"] == ["crow", "gull", "heron"]
    info = CustomDatasetInfo(wide["label_names"], wide["label_descriptions"])
    assert [info.index_to_description(column) for column in range(3)] == ["black", "white", "heron"]
