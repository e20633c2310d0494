"""The drawing: it holds all of both networks, measured, and nothing lies on anything else."""

import itertools

import pytest
import timm
import torch
from torch import nn

import netclone
from netclone.reporting.drawing import WIDTH, branch_boxes, lay_out

IMAGE = torch.zeros(1, 3, 64, 64)


def graft(source, target, **options):
    images, labels = torch.randn(20, 3, 64, 64), torch.arange(20) % 10
    old = [(images, labels % 5)]
    given = {"classes": [7, 9], "target_data": old, "budget": "channels", "method": "magnitude", "epochs": 1, **options}
    module = netclone.clone(source, target, [(images, labels)], distill_steps=1, **given)
    return netclone.inject(target, module, name="digits")


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
    drawing = lay_out(grafted, "digits", IMAGE, most)
    cost = netclone.cost(grafted, IMAGE, repeats=1)
    assert sum(box.macs or 0 for box in drawing.boxes) == cost.macs
    assert sum(box.parameters for box in drawing.boxes) == cost.parameters


@pytest.mark.parametrize("most", [3, 24])
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_nothing_lies_on_anything_else(kind, most, request):
    drawing = lay_out(request.getfixturevalue(kind), "digits", IMAGE, most)
    for one, two in itertools.combinations(drawing.boxes, 2):
        beside = one.x + one.width <= two.x or two.x + two.width <= one.x
        assert beside or one.y + one.height < two.y or two.y + two.height < one.y
    for box in drawing.boxes:
        assert 0 <= box.x < box.x + box.width <= drawing.width == WIDTH
        assert 0 <= box.y < box.y + box.height <= drawing.height
        assert len(box.short) * 8 < box.width
    for line in drawing.lines:
        for (x, y), (x2, y2) in itertools.pairwise(line.points):
            assert x == x2 or y == y2
            for box in drawing.boxes:  # a line touches a box at its end, and passes through none
                inside_x = max(min(x, x2), box.x) < min(max(x, x2), box.x + box.width) or (
                    x == x2 and box.x < x < box.x + box.width
                )
                inside_y = max(min(y, y2), box.y) < min(max(y, y2), box.y + box.height) or (
                    y == y2 and box.y < y < box.y + box.height
                )
                assert not (inside_x and inside_y), (line, box)


def test_what_is_drawn_of_a_cnn(cnn):
    drawing = lay_out(cnn, "digits", IMAGE)
    assert [(box.kind, box.label) for box in drawing.boxes] == [
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
        ("source", "bn2"),
        ("trained", "classifier"),
        ("logits", "5 of the target + 2 of 'digits'"),
    ]
    boxes = {box.label: box for box in drawing.boxes}
    assert drawing.tapped == "layer2"
    assert boxes["layer2"].y < drawing.tap[1] < boxes["layer3"].y
    assert boxes["adapter"].y == boxes["layer3"].y
    assert boxes["layer2"].shape == (48, 8, 8) and boxes["classifier"].shape == (2,)
    assert drawing.boxes[-1].shape == (7,)
    kept = {label: box.kept for label, box in boxes.items() if box.kept is not None}
    assert set(kept) == {"blocks.3", "blocks.4", "conv_head"}
    groups = [(kept, total) for name, kept, total in cnn.get_submodule("digits").spec.kept if name == "conv_head"]
    assert kept["conv_head"] == groups[0][0] / groups[0][1]
    assert {line.kind for line in drawing.lines} == {"target", "tap", "source", "features"}


def test_a_clone_at_the_input_is_tapped_behind_the_images(vit):
    drawing = lay_out(vit, "digits", IMAGE)
    first, second = drawing.boxes[:2]
    assert drawing.tapped == "input"
    assert first.y + first.height < drawing.tap[1] < second.y


def test_a_clone_without_adapter_and_classifier():
    """The source's own classifier is one of its blocks like any other."""
    source = timm.create_model("test_efficientnet", num_classes=4)
    mask = netclone.localize(source, method="magnitude", keep=0.5)
    module = netclone.extract(source, mask, at="blocks.2", classes=[1, 3])
    boxes = branch_boxes(module)
    assert [box.label for box in boxes] == ["blocks.3", "blocks.4", "conv_head", "bn2", "classifier"]
    assert {box.kind for box in boxes} == {"source"}
    assert boxes[-1].shape == (2,)
    assert sum(box.parameters for box in boxes) == sum(p.numel() for p in module.parameters())
    channels, height, width = module.spec.input_shape
    first = nn.Sequential(nn.AdaptiveAvgPool2d((height, width)), nn.Conv2d(3, channels, 1))
    target = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 25))
    grafted = netclone.inject(target, module, at="0", name="odd", example_inputs=torch.zeros(2, 3, 160, 160))
    grafted = netclone.inject(grafted, module, at="0", name="even")
    drawing = lay_out(grafted, "odd", torch.zeros(1, 3, 160, 160))
    assert drawing.boxes[-1].label == "25 of the target + 2 of 'odd' + 2 of 'even'"
    assert "features" not in {line.kind for line in drawing.lines}


@pytest.mark.slow
def test_what_all_of_a_source_lies_in_is_not_taken_for_a_block():
    source = nn.Sequential(timm.create_model("test_resnet", num_classes=10))
    grafted = graft(source, timm.create_model("test_resnet", num_classes=5), at="input", source_at=None)
    labels = [box.label for box in branch_boxes(grafted.get_submodule("digits"))]
    assert "0.layer2" in " ".join(labels) and len(labels) > 5


def test_refuses_a_name_that_is_not_there(cnn):
    with pytest.raises(netclone.CloneNameError, match="holds 'digits'"):
        lay_out(cnn, "shirts", IMAGE)
