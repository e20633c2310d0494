"""The curve of a gate: what is skipped keeps the target's prediction, from no old image to all of them."""

import pytest
import torch
from grafts import Colours, gated

import netclone
from netclone.errors import ArgumentError
from netclone.metrics.evaluating import predict
from netclone.metrics.skipping import Point, at_threshold, seen_whole, skipping

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
LOGITS = torch.nn.functional.one_hot(LABELS, 4).double() * 3
OLD, NEW = [0, 1], [2, 3]


def points(scores: list[float], logits: torch.Tensor = LOGITS) -> tuple[Point, ...]:
    return skipping(torch.tensor(scores), logits, LABELS, old=OLD, new=NEW)


def test_a_router_that_knows_the_new_classes_loses_nothing() -> None:
    found = points([0, 1, 2, 3, 4, 5, 6, 7])
    assert [point.skipped_old for point in found][::5] == [0, 0.25, 0.5, 0.75, 1]
    assert all(point.mean == 1 and point.skipped_new == 0 for point in found)


def test_a_router_that_takes_new_for_old_loses_the_new_classes() -> None:
    found = points([4, 5, 6, 7, 0, 1, 2, 3])
    assert found[0] == Point(0.0, 0.0, 1.0, 1.0)
    assert found[5] == Point(0.25, 1.0, 1.0, 0.0)


def test_skipping_an_image_that_the_clone_takes_wrongly_gives_it_back_to_the_target() -> None:
    logits = LOGITS.clone()
    logits[0, 2] = 9
    found = points([0, 1, 2, 3, 4, 5, 6, 7], logits)
    assert found[0].old == 0.75 and found[5].old == 1.0


def test_a_threshold_is_what_the_gate_itself_does() -> None:
    is_old = LABELS < 2
    found = at_threshold(0.0, torch.tensor([-1.0, 1, 1, 1, -1, 1, 1, 1]), LOGITS, LABELS, is_old, NEW)
    assert found == Point(0.25, 0.25, 1.0, 0.75)


def test_images_of_one_kind_make_no_curve() -> None:
    with pytest.raises(ArgumentError, match="needs images of old and of new classes"):
        skipping(torch.zeros(2), torch.zeros(2, 4), torch.tensor([0, 1]), old=OLD, new=NEW)


def test_the_network_itself_stands_on_its_curve() -> None:
    grafted, images, labels = gated()
    scores, logits = seen_whole(grafted, "late", images)
    real = predict(grafted, images)
    assert torch.equal((real[:, 4:] > -torch.inf).all(1), scores > 0)
    torch.testing.assert_close(real[scores > 0], logits[scores > 0])
    found = netclone.evaluate(grafted, [(images, labels)])
    point = at_threshold(0.0, scores, logits, labels, labels < 4, range(4, 6))
    assert (1 - found.sent_old, 1 - found.sent_new) == pytest.approx((point.skipped_old, point.skipped_new))
    assert (found.old, found.new) == (point.old, point.new)
    assert found.ms_per_image is not None and found.ms_per_image > 0


def test_a_clone_without_a_gate_has_no_curve() -> None:
    source, target = Colours(6), Colours(4).eval()
    mask = netclone.localize(source, method="magnitude", keep=1.0, example_inputs=torch.zeros(2, 3, 8, 8))
    module = netclone.extract(source, mask, classes=[4, 5], example_inputs=torch.zeros(2, 3, 8, 8))
    grafted = netclone.inject(target, module, at="input", name="late", example_inputs=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match="'late' has no gate"):
        seen_whole(grafted, "late", torch.zeros(2, 3, 8, 8))
    assert netclone.evaluate(grafted, [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))]).sent_old is None
