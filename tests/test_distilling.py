"""Distilling: a slim network comes nearer to the full one, or stays as it was."""

import copy

import pytest
import timm
import torch
from architectures import random_mask, untouched
from torch import nn

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import slim_down
from netclone.errors import FitError
from netclone.learning import distilling
from netclone.learning.distilling import distill
from netclone.learning.neighbourhoods import Neighbourhoods
from netclone.learning.stepping import Loop


@pytest.fixture(scope="module")
def pair():
    """A small network that depends on its input, a slim copy of it, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=6).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(40, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    groups = channel_groups(model, images[:2])
    return groups.graph_module, slim_down(groups, random_mask(groups, 0.6), None).graph_module, images


def distilled(pair, **options):
    teacher, student, images = pair
    student = copy.deepcopy(student)
    loop = Loop(batch_size=16, generator=torch.Generator().manual_seed(3))
    around = Neighbourhoods(images[:24], torch.ones(24), options.pop("augment", None))
    distill(student, teacher, around, images[24:], **{"steps": 4, "loop": loop, **options})
    return student


def distance(pair, student):
    teacher, _, images = pair
    with torch.no_grad():
        return float((student(images[24:]) - teacher(images[24:])).square().mean())


def test_the_slim_network_comes_nearer_to_the_full_one_on_unseen_images(pair):
    told = []
    loop = Loop(16, torch.Generator().manual_seed(3), progress=lambda done, total: told.append((done, total)))
    with untouched(pair[0]):
        student = distilled(pair, steps=16, loop=loop)
    assert distance(pair, student) < 0.8 * distance(pair, pair[1])
    assert told == [(step + 1, 16) for step in range(16)]
    flags = [parameter.requires_grad for parameter in pair[1].parameters()]
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert all(parameter.grad is None for parameter in student.parameters())
    for (name, before), after in zip(pair[1].named_buffers(), student.buffers(), strict=True):
        assert torch.equal(before, after), name  # normalisation statistics stay


def test_the_same_generator_gives_the_same_weights(pair):
    first, second = distilled(pair), distilled(pair)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_what_only_makes_it_worse_is_undone(pair, monkeypatch):
    monkeypatch.setattr(distilling, "LEARNING_RATE", 0.3)
    student = distilled(pair, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), pair[1].parameters(), strict=True))


def test_every_point_is_a_view_where_there_are_views(pair):
    """A view of nothing but noise leaves the student with nothing to learn from the samples."""
    seen = []

    def blank(images, generator):
        seen.append(len(images))
        return torch.zeros_like(images)

    plain, viewed = distilled(pair, steps=3), distilled(pair, steps=3, augment=blank)
    assert sum(seen) == 24 + 2 * 12  # of a batch of 16, eight points are samples and eight mix two of them
    assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), viewed.parameters(), strict=True))


def test_no_step_changes_nothing(pair):
    student = distilled(pair, steps=0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), pair[1].parameters(), strict=True))


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_flags(pair):
    teacher, student, images = pair
    student = copy.deepcopy(student)
    flags = [parameter.requires_grad for parameter in student.parameters()]
    with pytest.raises(FitError, match=r"distilling the clone, step 0: the loss is (nan|inf); check the data's scale"):
        around = Neighbourhoods(images[:8] * 1e38, torch.ones(8))
        distill(student, teacher, around, images[24:], steps=2, loop=Loop(8, torch.Generator()))
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
