"""The picture: what it says, that nothing overlaps, and that it is the PNG it claims to be."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import fx, nn

import netclone
from netclone.reporting.plotting import MOST_ROWS, MOST_STAGES, SIZE, Row, draw, rows, stages

pytestmark = pytest.mark.slow  # all of it rests on whole runs


def _graft(
    target: nn.Module, source: nn.Module, at: str, source_at: str | None, name: str, classes: list[int]
) -> fx.GraphModule:
    images = torch.randn(20, 3, 64, 64)
    labels = torch.arange(20) % 10
    old = [(images, labels % 5)]
    module = netclone.clone(
        source,
        target,
        [(images, labels)],
        classes=classes,
        target_data=old,
        at=at,
        source_at=source_at,
        budget="channels",
        method="magnitude",
        epochs=1,
    )
    return netclone.inject(target, module, name=name)


@pytest.fixture(scope="module")
def cnn() -> fx.GraphModule:
    target = timm.create_model("test_resnet", num_classes=7)
    source = timm.create_model("test_efficientnet", num_classes=10)
    return _graft(target, source, "layer2", "blocks.2", "digits", [7, 8, 9])


@pytest.fixture(scope="module")
def vit() -> fx.GraphModule:
    target = timm.create_model("test_vit", num_classes=1000, img_size=64)
    source = timm.create_model("test_vit", num_classes=10, img_size=64)
    return _graft(target, source, "blocks.1", "blocks.2", "a_clone_with_a_rather_long_name", [3])


def _extracted(name: str, at: str) -> fx.GraphModule:
    """A clone without adapter and classifier, tapped at the first layer, beside a second clone."""
    source = timm.create_model(name, num_classes=4)
    mask = netclone.localize(source, method="magnitude", keep=0.25)
    module = netclone.extract(source, mask, at=at, classes=[1, 3])
    channels, height, width = module.spec.input_shape
    first = nn.Sequential(nn.AdaptiveAvgPool2d((height, width)), nn.Conv2d(3, channels, 1))
    target = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 25))
    grafted = netclone.inject(target, module, at="0", name="odd", example_inputs=torch.zeros(2, 3, 160, 160))
    return netclone.inject(grafted, module, at="0", name="even")


def _texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text()]


def _extent(figure: Figure, text: Text) -> Bbox:
    return text.get_window_extent(figure.canvas.get_renderer())


def _check_readable(figure: Figure) -> None:
    texts = _texts(figure)
    extents = [_extent(figure, text) for text in texts]
    for (one, first), (two, second) in itertools.combinations(zip(texts, extents, strict=True), 2):
        assert not Bbox.intersection(first, second), f"{one.get_text()!r} overlaps {two.get_text()!r}"
    boxes = [patch.get_window_extent() for patch in figure.findobj(FancyBboxPatch)]
    for text, extent in zip(texts, extents, strict=True):
        assert 0 <= extent.x0 < extent.x1 <= SIZE[0], text.get_text()
        assert 0 <= extent.y0 < extent.y1 <= SIZE[1], text.get_text()
        assert text.get_fontsize() >= 8
        for box in boxes:  # a label lies in a box or outside of it
            if Bbox.intersection(extent, box):
                assert box.contains(extent.x0, extent.y0) and box.contains(extent.x1, extent.y1), text.get_text()
    for one, two in itertools.combinations(boxes, 2):
        assert not Bbox.intersection(one, two)


def test_cnn(cnn: fx.GraphModule, tmp_path: Path) -> None:
    figure = draw(cnn, "digits", tmp_path / "cnn.png")
    words = [text.get_text() for text in _texts(figure)]
    assert "tap: layer2" in words
    assert "clone 'digits': the source, cut behind 'blocks.2'" in words
    assert {"adapter", "classifier", "images", "layer2", "fc", "48 × 8 × 8"} <= set(words)  # noqa: RUF001
    assert words.count("48 / 96") + words.count("0 / 96") == 1
    for column in range(10):  # the target's logits by their index, the clone's by their class in the source
        assert str(column) in words
    _check_readable(figure)


def test_vit(vit: fx.GraphModule, tmp_path: Path) -> None:
    name = "a_clone_with_a_rather_long_name"
    figure = draw(vit, name, tmp_path / "vit.png")
    words = [text.get_text() for text in _texts(figure)]
    assert "tap: blocks.1" in words
    assert any(name in word and "(3)" in word for word in words)
    assert "1000 of the target" in words
    _check_readable(figure)


@pytest.mark.parametrize(
    ("source", "at"),
    [("test_resnet", "layer2"), ("test_efficientnet", "blocks.2")],  # the latter's own head is its `classifier`
)
def test_without_adapter(source: str, at: str, tmp_path: Path) -> None:
    grafted = _extracted(source, at)
    size = sum(parameter.numel() for parameter in grafted.get_submodule("odd").parameters())
    for name in ("odd", "even"):
        figure = draw(grafted, name, tmp_path / "extracted.png")
        words = [text.get_text() for text in _texts(figure)]
        assert "tap: 0" in words
        assert "adapter" not in words and not [word for word in words if word.startswith("trained to fit")]
        assert [word for word in words if word.startswith(f"{size:,} parameters, frozen")]
        _check_readable(figure)


def test_png_of_the_expected_size_and_the_same_twice(cnn: fx.GraphModule, tmp_path: Path) -> None:
    draw(cnn, "digits", tmp_path / "one.png")
    draw(cnn, "digits", tmp_path / "two.png")
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == SIZE == (1600, 900)
    assert content == (tmp_path / "two.png").read_bytes()


def test_stages_of_a_cnn(cnn: fx.GraphModule) -> None:
    found = stages(cnn, "digits")
    expected = [
        ("conv1", "act1"),
        ("maxpool", "layer1"),
        ("layer2", "layer2"),
        ("layer3", "layer3"),
        ("layer4", "layer4"),
        ("global_pool", "global_pool"),
        ("fc", "fc"),
    ]
    assert [(stage.first, stage.last) for stage in found] == expected
    assert [stage.shape for stage in found][2:] == [(48, 8, 8), (192, 4, 4), (96, 2, 2), (96,), (7,)]


def test_stages_hold_every_parameter_of_the_target_once(cnn: fx.GraphModule, vit: fx.GraphModule) -> None:
    for grafted, name in ((cnn, "digits"), (vit, "a_clone_with_a_rather_long_name")):
        target = netclone.remove(grafted, name)
        for most in (2, 3, MOST_STAGES, 50):
            found = stages(grafted, name, most)
            assert sum(stage.parameters for stage in found) == sum(p.numel() for p in target.parameters())


def test_stages_end_at_the_tap_however_few(vit: fx.GraphModule) -> None:
    for most in (2, 4, MOST_STAGES):
        found = stages(vit, "a_clone_with_a_rather_long_name", most)
        assert "blocks.1" in [stage.last for stage in found]
        assert len(found) <= max(most, 4)  # tap, features and logits end stages of their own


def test_a_clone_at_the_input_is_tapped_before_the_first_stage(tmp_path: Path) -> None:
    target = timm.create_model("test_resnet", num_classes=7)
    source = timm.create_model("test_efficientnet", num_classes=10)
    grafted = _graft(target, source, "input", None, "digits", [7, 8, 9])
    figure = draw(grafted, "digits", tmp_path / "input.png")
    _check_readable(figure)
    words = {text.get_text() for text in _texts(figure)}
    assert {"tap: input", "clone 'digits': the source, cut at its input", "classifier", "images"} <= words
    assert "adapter" not in words
    assert [stage.last for stage in stages(grafted, "digits")][-1] == "fc"


def test_rows_show_what_was_left_behind(cnn: fx.GraphModule) -> None:
    module = cnn.get_submodule("digits")
    found = {row.label: row for row in rows(module)}
    assert found["conv_stem"] == Row("conv_stem", 0, 24)
    assert found["blocks.4.0.conv_pw"] == Row("blocks.4.0.conv_pw", 96, 192)
    assert len(found) <= MOST_ROWS


def test_rows_are_summed_by_block_where_there_are_many(cnn: fx.GraphModule) -> None:
    module = cnn.get_submodule("digits")
    every = rows(module, 100)
    for most in (2, 4, 8):
        few = rows(module, most)
        assert len(few) <= most
        assert sum(row.kept for row in few) == sum(row.kept for row in every)
        assert sum(row.total for row in few) == sum(row.total for row in every)


def test_refuses_a_name_that_is_not_there(cnn: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(netclone.CloneNameError, match="holds 'digits'"):
        draw(cnn, "shirts", tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_refuses_a_place_it_cannot_write_to(cnn: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(netclone.ArgumentError, match="cannot write"):
        draw(cnn, "digits", tmp_path / "no folder" / "none.png")
