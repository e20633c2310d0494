"""Losses of SeaM and GradSplitter, worked out by hand on a network of two channels, and what is made of a mask."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from netclone.baselines import Recipe, validated
from netclone.baselines.modularising import (
    GRADSPLITTER,
    SEAM,
    kernels_retained,
    learned_values,
    masks_of,
    module_of_values,
    weights_retained,
)
from netclone.baselines.pruning import finetuned, masked, plain, torch_pruned
from netclone.baselines.subproblems import Given, Part, SubProblem, Told, calibrated
from netclone.channels.masks import ChannelMask
from netclone.errors import ArgumentError
from netclone.learning.data import Samples


class Two(nn.Module):
    """Two channels, each the mean of the positive pixels. Class 1 reads the first alone, and no class the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.linear.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
            self.linear.bias.copy_(torch.tensor([2.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.conv(x).relu().mean((2, 3)))
        return logits


def two() -> SubProblem:
    """Is it class 1? It is, where the pixels are 1 and not -1."""
    labels = torch.arange(20) % 2
    images = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    return SubProblem(Two().eval(), (1,), Samples(images, labels, "data"), Samples(images, labels, "validation"))


def test_what_is_retained_and_the_losses_by_hand() -> None:
    """Of 8 weights (2 of the convolution, 4 and 2 of the linear layer), 1 + 2 + 2 work on the first channel alone."""
    groups = two().groups
    assert [group.size for group in groups.groups] == [2]
    mask = [torch.tensor([1.0, 0.0])]
    weights, kernels = weights_retained(groups)(mask), kernels_retained(groups)(mask)
    assert (weights.item(), kernels.item()) == (5 / 8, 1 / 2)
    outputs, labels, ones = torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.ones(3)
    assert SEAM.value(outputs, labels, ones, weights).item() == pytest.approx(math.log(2) + 1.0 * 5 / 8)
    assert GRADSPLITTER.value(outputs, labels, ones, kernels).item() == pytest.approx(math.log(2) + 0.1 * 1 / 2)


def test_gradients_pass_through_the_step_clipped() -> None:
    """A channel has 1 + 2 of the 8 weights, whether its value is above zero or not."""
    groups = two().groups
    values = torch.tensor([0.5, -3.0], requires_grad=True)
    weights_retained(groups)(masks_of([values])).backward()
    assert values.grad is not None and values.grad.tolist() == [3 / 8, 3 / 8]
    values.grad = None
    (5 * masks_of([values])[0]).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("loss", [SEAM, GRADSPLITTER], ids=["SeaM", "GradSplitter"])
def test_a_channel_that_nothing_needs_falls_by_the_rate_at_every_step(loss) -> None:  # type: ignore[no-untyped-def]
    """The gradient of what is retained is constant, so Adam takes a whole step: 24 of 30 steps move the mask."""
    problem = two()
    [values] = learned_values(problem, loss, Recipe(lr=0.05, steps=30, batch_size=8))
    assert values[1].item() == pytest.approx(1 - 24 * 0.05, abs=1e-4)
    assert values[0] > values[1]
    part = module_of_values(problem, loss, [values], keep=0.5, recipe=Recipe(lr=0, steps=0))
    assert {name: tuple(p.shape) for name, p in part.body.named_parameters()} == {
        "conv.weight": (1, 1, 1, 1),
        "linear.weight": (2, 1),
        "linear.bias": (2,),
    }
    assert torch.equal(part.body.get_parameter("linear.weight"), torch.tensor([[0.0], [4.0]]))
    assert validated(part, problem.validation, problem.old)[0] == 1


def test_a_source_that_answers_outside_is_wrong_as_given_and_right_when_restricted() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 5.0]])
    assert Given(nn.Identity(), (1, 2))(logits).argmax(1).tolist() == [2]
    assert Given(nn.Identity(), (1,))(logits).argmax(1).tolist() == [0]
    assert Told((0, 1, 2, 3), (1, 2))(logits).argmax(1).tolist() == [0]


def test_a_yes_is_calibrated_on_the_clone_set() -> None:
    """A network that says yes too rarely: its scores tell the images apart, and a bias is all that is missing."""
    problem = two()
    with torch.no_grad():
        problem.source.linear.bias.copy_(torch.tensor([9.0, 0.0]))  # type: ignore[union-attr, operator]
    part = Part(problem.source, Told((0, 1), (1,)))
    assert validated(part, problem.validation, 1)[0] == 0.5
    assert validated(calibrated(part, problem), problem.validation, 1)[0] == 1


def test_answers_of_one_class_and_of_several() -> None:
    source = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).eval()
    images, labels = torch.randn(8, 1, 2, 2), torch.tensor([3, 0, 1, 3, 0, 1, 3, 0])
    samples = Samples(images, labels, "data")
    one, several = SubProblem(source, (3,), samples, samples), SubProblem(source, (3, 0, 1), samples, samples)
    assert one.train.labels.tolist() == [1, 0, 0, 1, 0, 0, 1, 0] and (one.answers, one.columns) == (2, (0, 1, 2, 3))
    assert several.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and (several.answers, several.columns) == (
        3,
        (3, 0, 1),
    )
    assert one.weights(one.train.labels)[one.train.labels == 1].sum() == pytest.approx(4)
    with pytest.raises(ArgumentError, match="expected a part of them"):
        replace(one, classes=(0, 1, 2, 3))


def test_fine_tuning_takes_statistics_by_batch_and_touches_neither_source_nor_slim_network() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    source = nn.Sequential(*layers, nn.Linear(4, 3)).eval()
    samples = Samples(5 + torch.randn(24, 1, 6, 6), torch.arange(24) % 3, "data")
    problem = SubProblem(source, (0, 2), samples.of_classes((0, 2)), samples.of_classes((0, 2)))
    before = [tensor.clone() for tensor in source.state_dict().values()]
    part = plain(problem, masked(problem, "magnitude", 0.6))
    [own] = [name for name, _ in part.named_buffers() if name.endswith("running_mean")]
    made = finetuned(problem, part, Recipe(lr=1e-2, steps=8, batch_size=8))
    assert made.get_buffer(own).abs().max() > 0.1 and part.get_buffer(own).abs().max() == 0
    assert not made.training
    assert made.body.state_dict().keys() == part.body.state_dict().keys()
    assert all(torch.equal(*pair) for pair in zip(before, source.state_dict().values(), strict=True))
    again = finetuned(problem, part, Recipe(lr=1e-2, steps=8, batch_size=8))
    assert torch.equal(made(samples.images), again(samples.images))


def test_without_torch_pruning_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ArgumentError, match="^torch-pruning is not installed"):
        torch_pruned(two(), 0.5)


def test_the_mask_by_hand_of_the_second_channel_leaves_the_source_s_answers() -> None:
    """The second channel plays no part, so the slim network answers as the source does."""
    problem = two()
    [group] = problem.groups.groups
    part = plain(problem, ChannelMask.from_kept(problem.groups, {group.name: [True, False]}))
    whole = Part(problem.source, Told((0, 1), (1,)))
    assert torch.equal(part(problem.shown.images), whole(problem.shown.images))
