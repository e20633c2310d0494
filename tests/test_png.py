"""The PNG: it shows what the layout says, nothing overlaps, and it is the PNG it claims to be."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
import timm
import torch
from grafts import LONG, cnn_graft, extracted, graft, vit_graft
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import fx

import netclone
from netclone.reporting.layout import ACROSS, lay_out
from netclone.reporting.png import MOST_STAGES, draw

pytestmark = pytest.mark.slow  # all of it rests on whole runs


@pytest.fixture(scope="module")
def cnn() -> fx.GraphModule:
    return cnn_graft()


@pytest.fixture(scope="module")
def vit() -> fx.GraphModule:
    return vit_graft()


def _words(figure: Figure) -> list[str]:
    return [text.get_text() for text in _texts(figure)]


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
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width, text.get_text()
        assert 0 <= extent.y0 < extent.y1 <= figure.bbox.height, text.get_text()
        assert text.get_fontsize() / 0.72 * 690 / figure.bbox.width >= 8, text.get_text()  # pixels of a page
        for box in boxes:  # a label lies in a box or outside of it
            if Bbox.intersection(extent, box):
                assert box.contains(extent.x0, extent.y0) and box.contains(extent.x1, extent.y1), text.get_text()
    for one, two in itertools.combinations(boxes, 2):
        assert not Bbox.intersection(one, two)


def test_shows_all_that_the_layout_says(cnn: fx.GraphModule, vit: fx.GraphModule, tmp_path: Path) -> None:
    for grafted, name in ((cnn, "digits"), (vit, LONG)):
        figure = draw(grafted, name, tmp_path / "picture.png")
        layout = lay_out(grafted, name, torch.zeros(1, 3, 64, 64), MOST_STAGES, ACROSS)
        title, *words = _words(figure)
        said = [text.words for box in layout.boxes for text in box.texts] + [words for _, words in layout.legend]
        assert words == said
        assert title.startswith(f"Clone '{name}' (") and title.endswith(f"at '{layout.tapped}'")
        boxes = figure.findobj(FancyBboxPatch)[: len(layout.boxes)]
        assert [box.get_bbox().bounds for box in boxes] == [
            (box.x, box.y, box.width, box.height) for box in layout.boxes
        ]
        _check_readable(figure)


@pytest.mark.parametrize(
    ("source", "at"),
    [("test_resnet", "layer2"), ("test_efficientnet", "blocks.2")],  # the latter's own head is its `classifier`
)
def test_without_adapter(source: str, at: str, tmp_path: Path) -> None:
    grafted = extracted(source, at)
    for name in ("odd", "even"):
        figure = draw(grafted, name, tmp_path / "extracted.png")
        words = _words(figure)
        assert "adapter" not in words and not [word for word in words if word.startswith("fitted")]
        _check_readable(figure)


def test_a_clone_at_the_input(tmp_path: Path) -> None:
    target = timm.create_model("test_resnet", num_classes=7)
    source = timm.create_model("test_efficientnet", num_classes=10)
    figure = draw(graft(source, target, at="input", source_at=None), "digits", tmp_path / "input.png")
    assert "adapter" not in _words(figure) and "classifier" in _words(figure)
    _check_readable(figure)


def test_twice_the_pixels_of_the_page_and_the_same_twice(cnn: fx.GraphModule, tmp_path: Path) -> None:
    figure = draw(cnn, "digits", tmp_path / "one.png")
    draw(cnn, "digits", tmp_path / "two.png")
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (round(2 * figure.bbox.width), round(2 * figure.bbox.height))
    assert content == (tmp_path / "two.png").read_bytes()


def test_refuses_a_name_that_is_not_there(cnn: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(netclone.CloneNameError, match="holds 'digits'"):
        draw(cnn, "shirts", tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_refuses_a_place_it_cannot_write_to(cnn: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(netclone.ArgumentError, match="cannot write"):
        draw(cnn, "digits", tmp_path / "no folder" / "none.png")
