import pytest
import torch
from torch import Tensor, nn

import netclone


class Table(nn.Module):
    """Returns fixed logits: image i holds its own row number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


IMAGES = torch.arange(6.0).reshape(6, 1, 1, 1)
LOGITS = torch.tensor(
    [
        [9.0, 1, 0, 0],  # old 0, right
        [1.0, 2, 5, 0],  # old 1, taken by new column 2; right among old
        [9.0, 1, 0, 0],  # old 1, wrong
        [0.0, 0, 9, 0],  # new 2, right
        [9.0, 0, 1, 0],  # new 2, wrong
        [0.0, 0, 0, 9],  # new 3, right
    ]
)
LABELS = torch.tensor([0, 1, 1, 2, 2, 3])


def test_scores_are_those_counted_by_hand() -> None:
    scores = netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], batch_size=4)
    assert scores.old == pytest.approx(1 / 3)
    assert scores.new == pytest.approx(2 / 3)
    assert scores.all == pytest.approx(3 / 6)
    assert scores.locality_open == pytest.approx(1 / 3)
    assert scores.locality_closed is None
    assert scores.samples == 6


def test_closed_locality_compares_with_the_reference_among_old_classes() -> None:
    before = Table(LOGITS[:, :2])
    after = Table(LOGITS)
    scores = netclone.evaluate(after, [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], reference=before)
    assert scores.locality_closed == 0.0
    moved = LOGITS[:, :2].clone()
    moved[0] = torch.tensor([0.0, 1.0])
    scores = netclone.evaluate(after, [(IMAGES, LABELS)], old=[0, 1], new=[2, 3], reference=Table(moved))
    assert scores.locality_closed == pytest.approx(1 / 3)


def test_a_class_without_a_column_counts_as_wrong() -> None:
    scores = netclone.evaluate(Table(LOGITS[:, :2]), [(IMAGES, LABELS)], old=[0, 1], new=[2, 3])
    assert scores.new == 0.0


def test_modes_and_random_state_are_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten())
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    netclone.evaluate(model, [(IMAGES, LABELS % 2)])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_stray_labels_and_overlap_are_refused() -> None:
    with pytest.raises(netclone.DataError, match="label 3 is neither old"):
        netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], old=[0, 1], new=[2])
    with pytest.raises(netclone.ArgumentError, match=r"share the labels \[1\]"):
        netclone.evaluate(Table(LOGITS), [(IMAGES, LABELS)], old=[0, 1], new=[1, 2, 3])


def test_a_model_without_logits_is_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(netclone.OutputError, match="Two returns tuple"):
        netclone.evaluate(Two(), [(IMAGES, LABELS)])


def test_cost_counts_parameters_and_macs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 36, 5))
    cost = netclone.cost(model, torch.zeros(1, 3, 8, 8), repeats=2)
    assert cost.parameters == 3 * 8 * 9 + 8 * 36 * 5 + 5
    assert cost.macs == 3 * 8 * 9 * 36 + 8 * 36 * 5
    assert cost.latency_ms > 0
