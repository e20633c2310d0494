import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netclone.errors import AdapterError
from netclone.learning.adapting import Adapter, Classifier, Grid, grid_of
from netclone.learning.data import OLD_WEIGHT

SHAPES = {"NCHW": (5, 4, 4), "NHWC": (4, 4, 7), "NLC": (18, 6), "NC": (3,)}


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((64, 7, 7), Grid("NCHW", 64, 7, 7)),
        ((64, 7, 9), Grid("NCHW", 64, 7, 9)),
        ((7, 7, 96), Grid("NHWC", 96, 7, 7)),
        ((8, 8, 8), Grid("NCHW", 8, 8, 8)),
        ((49, 96), Grid("NLC", 96, 7, 7, 0)),
        ((198, 192), Grid("NLC", 192, 14, 14, 2)),
        ((23, 12), Grid("NLC", 12, 1, 23)),
        ((10,), Grid("NC", 10)),
    ],
)
def test_shapes_are_read_as_grids(shape: tuple[int, ...], grid: Grid) -> None:
    assert grid_of(shape) == grid


def test_features_without_a_channel_axis_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"there is no adapter for volumes, only for maps .*, tokens .* and vectors"):
        grid_of((2, 3, 4, 5))


@pytest.mark.parametrize(("source", "destination"), list(itertools.product(SHAPES, SHAPES)))
def test_every_pair_of_layouts_maps_shape_to_shape(source: str, destination: str) -> None:
    adapter = Adapter(grid_of(SHAPES[source]), grid_of(SHAPES[destination]))
    assert adapter(torch.randn(3, *SHAPES[source])).shape == (3, *SHAPES[destination])


@settings(max_examples=15, deadline=None)
@given(
    source=st.sampled_from([(5, 4, 4), (4, 4, 7), (18, 6)]),
    destination=st.sampled_from([(3, 4, 4), (4, 4, 2), (18, 4), (16, 4), (3, 2, 2), (3, 8, 8)]),
    seed=st.integers(0, 1000),
)
def test_the_closed_form_start_finds_the_adapter_that_made_the_data(
    source: tuple[int, ...], destination: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    true = Adapter(grid_of(source), grid_of(destination)).double()
    found = Adapter(grid_of(source), grid_of(destination)).double()
    features = torch.randn(64, *source, dtype=torch.float64)
    wanted = true(features).detach()
    found.solve(features, wanted)
    error = (found(features) - wanted).pow(2).mean() / wanted.var()
    assert error < 1e-4  # the ridge of 1e-3 costs its square


def test_the_classifier_starts_as_the_sources_own_rows() -> None:
    module, target = torch.randn(50, 6), torch.randn(50, 4) * 3 + 1
    weight, bias = torch.randn(2, 6), torch.randn(2)
    classifier = Classifier(6, 4, 2)
    classifier.start(module, target, weight, bias)
    torch.testing.assert_close(classifier(module, target), module @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_with_rows_for_the_rest_the_source_tells_new_from_old_and_the_target_the_old_ones() -> None:
    features, logits = torch.randn(50, 6), torch.randn(50, 4) * 3 + 1
    weight, bias = torch.randn(5, 6), torch.randn(5)  # two new classes, three others of the source
    classifier = Classifier(6, 4, 2)
    classifier.start(features, logits, weight, bias)
    joint = torch.cat([logits, classifier(features, logits)], 1).softmax(1)
    source = (features @ weight.T + bias).softmax(1) * torch.tensor([1, 1, *[OLD_WEIGHT] * 3])  # the rest is old
    source = source / source.sum(1, keepdim=True)
    torch.testing.assert_close(joint[:, 4:], source[:, :2])
    torch.testing.assert_close(joint[:, :4], source[:, 2:].sum(1, keepdim=True) * logits.softmax(1))


def test_without_rows_the_module_gives_the_logits() -> None:
    logits = torch.randn(50, 2)
    classifier = Classifier(2, 4, 2)
    classifier.start(logits, torch.randn(50, 4), None, None)
    torch.testing.assert_close(classifier(logits, torch.randn(50, 4)), logits)


def test_without_the_targets_stream_new_logits_change_with_the_target_only_by_its_mass() -> None:
    features, logits = torch.randn(6, 4), torch.randn(6, 3)
    alone = Classifier(4, 3, 2, both=False)
    alone.start(features, logits, torch.randn(5, 4), torch.zeros(5))
    torch.nn.init.normal_(alone.linear.weight)
    moved = logits.roll(1, 1)  # the same sum of exponentials
    assert torch.allclose(alone(features, logits), alone(features, moved))
    plain = Classifier(4, 3, 2, both=False)
    plain.start(features, logits, torch.randn(2, 4), None)
    assert torch.equal(plain(features, logits), plain(features, 2 * logits))
