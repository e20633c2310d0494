"""The layout: it holds all of both networks, measured, and nothing lies on anything else, down a page or across."""

import itertools

import pytest
import timm
import torch
from grafts import extracted, graft
from torch import nn

import netclone
from netclone.reporting.layout import ACROSS, DOWN, SIZES, branch_boxes, lay_out

IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture(scope="module")
def cnn():
    source = timm.create_model("test_efficientnet", num_classes=10)
    return graft(source, timm.create_model("test_resnet", num_classes=5), at="layer2", source_at="blocks.2")


@pytest.fixture(scope="module")
def vit():
    source = timm.create_model("test_vit", num_classes=10, img_size=64)
    target = timm.create_model("test_vit", num_classes=1000, img_size=64)
    return graft(source, target, at="input", source_at=None)


@pytest.mark.parametrize("most", [3, 24])
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_holds_every_parameter_and_all_macs_once(kind, most, request):
    grafted = request.getfixturevalue(kind)
    layout = lay_out(grafted, "digits", IMAGE, most)
    cost = netclone.cost(grafted, IMAGE, repeats=1)
    assert sum(box.macs or 0 for box in layout.boxes) == cost.macs
    assert sum(box.parameters for box in layout.boxes) == cost.parameters


@pytest.mark.parametrize("most", [3, 24])
@pytest.mark.parametrize("kind", ["cnn", "vit"])
@pytest.mark.parametrize("way", [DOWN, ACROSS], ids=["down", "across"])
def test_nothing_lies_on_anything_else(way, kind, most, request):
    layout = lay_out(request.getfixturevalue(kind), "digits", IMAGE, most, way)
    for one, two in itertools.combinations(layout.boxes, 2):
        beside = one.x + one.width <= two.x or two.x + two.width <= one.x
        assert beside or one.y + one.height <= two.y or two.y + two.height <= one.y
    for box in layout.boxes:
        assert 0 <= box.x < box.x + box.width <= layout.width
        assert 0 <= box.y < box.y + box.height <= layout.height
        assert all(one.y + SIZES[two.kind] <= two.y for one, two in itertools.pairwise(box.texts))
        assert box.y < box.texts[0].y - SIZES[box.texts[0].kind]
        assert box.texts[-1].y < (box.y + box.height if box.kept is None else box.bar[1])
        assert all(len(text.words) * 8 < box.width for text in box.texts if text.kind == "name")
    for edge in layout.edges:
        for (x, y), (x2, y2) in itertools.pairwise(edge.points):
            assert x == x2 or y == y2
            for box in layout.boxes:  # an edge touches a box at its end, and passes through none
                inside_x = max(min(x, x2), box.x) < min(max(x, x2), box.x + box.width) or (
                    x == x2 and box.x < x < box.x + box.width
                )
                inside_y = max(min(y, y2), box.y) < min(max(y, y2), box.y + box.height) or (
                    y == y2 and box.y < y < box.y + box.height
                )
                assert not (inside_x and inside_y), (edge, box)


def test_what_is_drawn_of_a_cnn(cnn):
    layout = lay_out(cnn, "digits", IMAGE)
    assert [(box.kind, box.label) for box in layout.boxes] == [
        ("images", "images"),
        ("target", "conv1 to act1"),
        ("target", "maxpool to layer1"),
        ("target", "layer2"),
        ("target", "layer3"),
        ("target", "layer4"),
        ("target", "global_pool"),
        ("target", "fc"),
        ("trained", "adapter"),
        ("source", "blocks.3"),
        ("source", "blocks.4"),
        ("source", "conv_head"),
        ("trained", "classifier"),
        ("logits", "5 of the target + 2 of 'digits'"),
    ]
    boxes = {box.label: box for box in layout.boxes}
    assert layout.tapped == "layer2"
    assert boxes["layer2"].y < layout.tap[1] < boxes["layer3"].y
    assert boxes["classifier"].y == boxes["fc"].y  # the branch ends with the target, where it has room to
    assert boxes["layer2"].shape == (48, 8, 8) and boxes["classifier"].shape == (2,)
    assert layout.boxes[-1].shape == (7,)
    kept = {label: box.kept for label, box in boxes.items() if box.kept is not None}
    assert set(kept) == {"blocks.3", "blocks.4", "conv_head"}
    groups = [(kept, total) for name, kept, total in cnn.get_submodule("digits").spec.kept if name == "conv_head"]
    assert kept["conv_head"] == groups[0][0] / groups[0][1]
    assert {edge.kind for edge in layout.edges} == {"target", "tap", "source", "features"}


def test_a_clone_at_the_input_is_tapped_behind_the_images(vit):
    layout = lay_out(vit, "digits", IMAGE)
    first, second = layout.boxes[:2]
    assert layout.tapped == "input"
    assert first.y + first.height < layout.tap[1] < second.y


def test_a_clone_without_adapter_and_classifier():
    """The source's own classifier is one of its blocks like any other."""
    grafted = extracted("test_efficientnet", "blocks.2")
    module = grafted.get_submodule("odd")
    boxes = branch_boxes(module)
    assert [box.label for box in boxes] == ["blocks.3", "blocks.4", "conv_head", "bn2", "classifier"]
    assert {box.kind for box in boxes} == {"source"}
    assert boxes[-1].shape == (2,)
    assert sum(box.parameters for box in boxes) == sum(p.numel() for p in module.parameters())
    layout = lay_out(grafted, "odd", torch.zeros(1, 3, 160, 160))
    assert layout.boxes[-1].label == "25 of the target + 2 of 'odd' + 2 of 'even'"
    assert "features" not in {edge.kind for edge in layout.edges}


@pytest.mark.slow
def test_what_all_of_a_source_lies_in_is_not_taken_for_a_block():
    source = nn.Sequential(timm.create_model("test_resnet", num_classes=10))
    grafted = graft(source, timm.create_model("test_resnet", num_classes=5), at="input", source_at=None)
    labels = [box.label for box in branch_boxes(grafted.get_submodule("digits"))]
    assert "0.layer2" in " ".join(labels) and len(labels) > 5


def test_refuses_a_name_that_is_not_there(cnn):
    with pytest.raises(netclone.CloneNameError, match="holds 'digits'"):
        lay_out(cnn, "shirts", IMAGE)


def test_a_branch_longer_than_the_target_begins_below_the_images():
    """The corner beside the images is left to the buttons of the page."""
    layout = lay_out(extracted("test_efficientnet", "blocks.0"), "odd", torch.zeros(1, 3, 160, 160))
    images, first = layout.boxes[0], next(box for box in layout.boxes if box.kind == "source")
    assert images.y + images.height < first.y
    assert layout.boxes[-2].y + layout.boxes[-2].height < layout.boxes[-1].y


def test_the_legend_names_what_is_there(cnn):
    assert [kind for kind, _ in lay_out(cnn, "digits", IMAGE).legend] == ["target", "source", "trained", "tap"]
    plain = lay_out(extracted("test_resnet", "layer2"), "odd", torch.zeros(1, 3, 160, 160))
    assert [kind for kind, _ in plain.legend] == ["target", "source", "tap"]


def test_the_logits_of_very_many_clones_are_summed_up():
    grafted = extracted("test_resnet", "layer2")
    module = grafted.get_submodule("odd")
    for number in range(12):
        grafted = netclone.inject(grafted, module, at="0", name=f"clone{number}")
    texts = lay_out(grafted, "odd", torch.zeros(1, 3, 160, 160), 5, ACROSS).boxes[-1].texts
    assert [text.words for text in texts][-1] == "and 3 more" and len(texts) == 14
