"""One look: colours that pages and pictures share, pictures for a page's width, labels that lie on nothing."""

import itertools
import struct

import pytest
from matplotlib.colors import to_hex
from matplotlib.transforms import Bbox

from netclone.reporting.style import DARK, LIGHT, NETCLONE, WIDTH, figure, label, panel, save

POINTS = {"netclone": (1.0, 2.0), "beside": (1.1, 2.0), "above": (1.0, 2.1), "far": (3.0, 1.0), "corner": (0.0, 1.0)}


def ours(name):
    return name == "netclone"


@pytest.fixture
def axes():
    made = panel(figure(300), "title", "x", "y", "\N{NORTH WEST ARROW}")
    for point in POINTS.values():
        made.plot(*point, "o")
    return made


def texts(axes):
    return {text.get_text(): text for text in axes.texts}


def test_pages_that_are_light_and_dark_have_the_same_colours_by_name():
    assert list(LIGHT) == list(DARK)
    assert LIGHT["orange"] == DARK["orange"] == NETCLONE


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_what_is_written_can_be_read(colours):
    """By the contrast that WCAG asks of text, 4.5."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ink, paper in [("ink", "page"), ("faint", "page"), ("orange-ink", "page"), ("ink", "orange-pale")]:
        dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_a_name_lies_on_no_point_no_other_name_and_no_line(axes):
    line = [(0.0, 1.5), (3.0, 1.5)]
    label(axes, POINTS, ours, [line])
    assert set(texts(axes)) == set(POINTS)
    extents = [text.get_window_extent() for text in texts(axes).values()]
    assert not any(Bbox.intersection(one, two) for one, two in itertools.combinations(extents, 2))
    for point in [*POINTS.values(), *((x / 10, 1.5) for x in range(31))]:
        place = axes.transData.transform(point)
        assert not any(extent.contains(*place) for extent in extents)
    assert all(axes.bbox.contains(*extent.min) and axes.bbox.contains(*extent.max) for extent in extents)


def test_only_what_is_ours_is_set_off(axes):
    label(axes, POINTS, ours, [])
    colours = {name: (to_hex(text.get_color()).upper(), text.get_weight()) for name, text in texts(axes).items()}
    assert colours.pop("netclone") == (LIGHT["orange-ink"], "bold")
    assert set(colours.values()) == {(LIGHT["faint"], "normal")}


def test_names_stay_beside_their_points_at_any_resolution(axes):
    label(axes, POINTS, ours, [])
    before = {name: text.get_window_extent().min for name, text in texts(axes).items()}
    axes.figure.set_dpi(200)
    for name, text in texts(axes).items():
        assert text.get_window_extent().min == pytest.approx(2 * before[name], abs=2)  # of letters that are hinted


def test_the_arrow_says_where_better_is(axes):
    assert axes.get_title("right") == "\N{NORTH WEST ARROW} better"


def test_a_picture_has_twice_the_pixels_of_the_page_and_the_same_bytes_again(axes, tmp_path):
    for name in ("one.png", "two.png"):
        save(axes.figure, tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (2 * WIDTH, 600)
    assert content == (tmp_path / "two.png").read_bytes()
