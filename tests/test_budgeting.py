"""Budgets in channels, parameters and MACs."""

import pytest
import timm
import torch
from architectures import random_mask

from netclone.channels import budgeting
from netclone.channels.budgeting import Allocation, Measure, channel_share
from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.errors import ArgumentError
from netclone.graph.counting import MacCounter
from netclone.graph.measuring import measure
from netclone.learning.localizing import localize


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def groups(request):
    torch.manual_seed(0)
    return channel_groups(timm.create_model(request.param, num_classes=4), torch.randn(2, 3, 160, 160))


def size(model, budget, image):
    if budget == "params":
        return sum(parameter.numel() for parameter in model.parameters())
    with MacCounter() as counter:
        model(image)
    return counter.macs


@pytest.mark.parametrize(
    ("budget", "keep"), [("params", 0.4), pytest.param("params", 0.8, marks=pytest.mark.long), ("macs", 0.5)]
)
def test_the_slim_network_uses_up_its_budget_and_no_more(groups, budget, keep):
    image = torch.randn(1, 3, 160, 160)
    whole = size(groups.graph_module, budget, image)
    within = extract(groups, localize(groups, method="magnitude", keep=keep, budget=budget))
    assert size(within, budget, image) <= keep * whole
    more = channel_share(groups, keep, Measure(budget)) + 2e-3
    beyond = extract(groups, localize(groups, method="magnitude", keep=more))
    assert size(beyond, budget, image) > keep * whole


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_rows_of_other_classes_leave_room_for_channels(budget, allocation):
    """A classifier of a thousand classes is most of this network, and none of what is extracted for two."""
    torch.manual_seed(0)
    groups = channel_groups(timm.create_model("test_resnet", num_classes=1000), torch.randn(2, 3, 64, 64))
    image = torch.randn(1, 3, 64, 64)
    whole = size(groups.graph_module, budget, image)
    options = {"method": "magnitude", "keep": 0.4, "budget": budget, "allocation": allocation}
    masks = [localize(groups, classes=classes, **options) for classes in ([3, 7], None)]
    sizes = [size(extract(groups, mask, classes=[3, 7]), budget, image) for mask in masks]
    assert sizes[1] <= sizes[0] <= 0.4 * whole
    assert sizes[1] < sizes[0] or budget == "macs"  # the classifier has few MACs
    assert sizes[0] > 0.36 * whole
    assert size(extract(groups, masks[1]), budget, image) <= 0.4 * whole


def test_a_share_of_the_channels_is_taken_as_it_is(groups):
    assert channel_share(groups, 0.3, Measure("channels")) == 0.3
    assert channel_share(groups, 1.0, Measure("params")) == 1.0


def test_a_budget_out_of_reach_is_refused(groups):
    with pytest.raises(
        ArgumentError, match=r"keep: 1e-06 of the params cannot be reached.*leaves 0\.\d+; keep at least"
    ):
        localize(groups, method="magnitude", keep=1e-6, budget="params")


def test_an_unknown_budget_is_refused(groups):
    with pytest.raises(ArgumentError, match="budget: got 'flops', expected one of 'channels', 'params', 'macs'"):
        localize(groups, method="magnitude", budget="flops")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_closed_form_of_the_parameters_is_the_slim_networks(name):
    torch.manual_seed(0)
    groups = channel_groups(timm.create_model(name, num_classes=4), torch.randn(2, 3, 160, 160))
    allocation = Allocation(groups, Measure("params"))
    for seed in range(2):
        mask = random_mask(groups, 0.3 + 0.4 * seed, seed)
        kept = [sum(flags) for _, flags in mask.kept]
        assert allocation.size(kept) == size(extract(groups, mask), "params", None)


def test_the_closed_form_of_the_macs_is_the_slim_convolutional_networks():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 64)
    groups = channel_groups(timm.create_model("test_efficientnet", num_classes=4), image)
    allocation = Allocation(groups, Measure("macs"))
    mask = random_mask(groups, 0.5)
    assert allocation.size([sum(flags) for _, flags in mask.kept]) == size(extract(groups, mask), "macs", image)


@pytest.mark.parametrize(("budget", "keep"), [("params", 0.7), ("macs", 0.6)])
def test_a_budget_is_divided_by_score_and_cost_and_kept(budget, keep):
    image = torch.randn(1, 3, 64, 64)
    groups = channel_groups(timm.create_model("test_resnet", num_classes=4), image)
    mask = localize(groups, method="magnitude", keep=keep, budget=budget, allocation="global")
    share = size(extract(groups, mask), budget, image) / size(groups.graph_module, budget, image)
    assert 0.8 * keep < share <= keep
    shares = {sum(flags) / len(flags) for _, flags in mask.kept if len(flags) > 8}
    assert len(shares) > 1  # not the same of every group


def test_the_units_with_the_highest_scores_are_kept_wherever_they_are(groups):
    allocation = Allocation(groups, Measure("params"))
    favoured = [torch.full((group.size,), float(number == 0)) for number, group in enumerate(groups.groups)]
    flags = allocation.flags(favoured, 0.5)
    assert bool(flags[0].all())
    nothing = [torch.arange(group.size).float() for group in groups.groups]
    assert [int(flag.sum()) for flag in allocation.flags(nothing, 1e-9)] == [1] * len(groups)
    assert all(bool(flag[-1]) for flag in allocation.flags(nothing, 1e-9))  # the best of each


def test_an_allocation_that_does_not_fit_the_budget_is_refused(groups):
    with pytest.raises(ArgumentError, match="allocation: got 'best', expected one of 'global', 'uniform' or None"):
        localize(groups, method="magnitude", allocation="best")
    with pytest.raises(ArgumentError, match="allocation: 'global' divides.*with budget='channels' every group keeps"):
        localize(groups, method="magnitude", allocation="global")


# A budget of time, with a clock that counts MACs instead


@pytest.fixture
def counted(monkeypatch):
    """Time is MACs: of every node, and of one network beside another."""

    def of_nodes(graph, images):
        return {name: node.macs * 1e-9 for name, node in measure(graph, images).items()}

    def relative(model, other, images):
        return size(model, "macs", images) / size(other, "macs", images)

    monkeypatch.setattr(budgeting, "seconds_of_nodes", of_nodes)
    monkeypatch.setattr(budgeting, "relative_time", relative)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_slim_network_takes_the_time_it_may_and_hardly_less(groups, counted, allocation):
    options = {"method": "magnitude", "keep": 0.5, "budget": "latency", "allocation": allocation}
    module = extract(groups, localize(groups, **options), fold_batch_norm=True)
    image = torch.randn(1, 3, 160, 160)
    share = size(module, "macs", image) / size(groups.graph_module, "macs", image)
    assert 0.9 * 0.5 <= share <= 0.5  # a head of a ViT is a unit, and a twentieth of its time


def test_time_that_no_width_saves_is_refused_with_what_can_be_had(groups, counted, monkeypatch):
    monkeypatch.setattr(budgeting, "relative_time", lambda model, other, images: 0.8)
    with pytest.raises(ArgumentError, match=r"keep: 0.5 of the latency cannot be reached .* leaves 0.8"):
        localize(groups, method="magnitude", keep=0.5, budget="latency")


def test_a_budget_is_not_refused_before_the_least_was_tried(counted, monkeypatch):
    """However often the clock says that it is too much."""
    groups = channel_groups(timm.create_model("test_resnet", num_classes=4), torch.randn(2, 3, 64, 64))
    shares = iter([0.51] * 9)
    monkeypatch.setattr(budgeting, "relative_time", lambda model, other, images: next(shares, 0.49))
    localize(groups, method="magnitude", keep=0.5, budget="latency")
    assert next(shares, None) is None


def test_time_is_measured_for_as_many_images_as_asked(groups, monkeypatch):
    seen = []

    def of_nodes(graph, images):
        seen.append(len(images))
        return {node.name: 1.0 for node in graph.graph.nodes}

    monkeypatch.setattr(budgeting, "seconds_of_nodes", of_nodes)
    monkeypatch.setattr(budgeting, "relative_time", lambda model, other, images: seen.append(len(images)) or 0.5)
    localize(groups, method="magnitude", keep=0.5, budget="latency", latency_batch=3)
    assert set(seen) == {3}


@pytest.mark.parametrize("budget", ["channels", "params", "macs"])
def test_widths_are_multiples_of_what_is_asked_for(groups, budget):
    mask = localize(groups, method="magnitude", keep=0.6, budget=budget, round_to=8)
    kept = {name: (sum(flags), len(flags)) for name, flags in mask.kept}
    assert all(count % 8 == 0 for count, size in kept.values() if size >= 16)
    assert any(count < size for count, size in kept.values())


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_budget_that_no_width_reaches_is_refused_in_multiples_too(groups, budget, allocation):
    options = {"method": "magnitude", "keep": 1e-4, "budget": budget, "allocation": allocation}
    with pytest.raises(ArgumentError, match=r"cannot be reached .*: one unit in every group leaves 0\.\d+"):
        localize(groups, **options, round_to=8)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_group_that_is_hardly_needed_is_narrower_than_a_multiple(groups, allocation):
    """Or a small budget could not be reached in multiples."""
    options = {"method": "magnitude", "keep": 0.3, "budget": "macs", "allocation": allocation}
    kept = {name: (sum(flags), len(flags)) for name, flags in localize(groups, **options, round_to=8).kept}
    assert all(count % 8 == 0 or count < 8 for count, size in kept.values() if size >= 16)


def test_what_all_features_pass_through_is_no_bottleneck():
    """Whatever the scores say. A residual branch may be as narrow as they do."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3), torch.nn.ReLU()),
        *(torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 4)),
    ).eval()
    groups = channel_groups(plain, torch.randn(2, 3, 8, 8))
    scores = [torch.linspace(0, 1, 64), torch.linspace(5, 6, 64)]
    allocation = Allocation(groups, Measure("macs"))
    assert allocation.least(0.25) == [27, 27]  # 0.85 of 32
    assert int(allocation.flags(scores, 0.25)[0].sum()) == 27
    assert allocation.least(1e-4) == [1, 1]  # even so much of such a width would be too much
    residual = channel_groups(timm.create_model("test_resnet", num_classes=4), torch.randn(2, 3, 64, 64))
    fewest = dict(
        zip((group.name for group in residual.groups), Allocation(residual, Measure("macs")).least(0.25), strict=True)
    )
    assert fewest["layer1.0.conv1"] == 1 and fewest["conv1.0"] == round(residual["conv1.0"].size * 0.85 / 2)
    without = Allocation(residual, Measure("macs")).doing_without(["layer1.0.conv1"])
    assert without.least(0.25)[[group.name for group in residual.groups].index("layer1.0.conv1")] == 0


@pytest.mark.parametrize("name", ["round_to", "latency_batch"])
@pytest.mark.parametrize("value", [0, 1.5, True, "8"])
def test_a_measure_that_cannot_be_is_refused_by_name(groups, name, value):
    with pytest.raises(ArgumentError, match=f"{name}: got {value!r}"):
        localize(groups, method="magnitude", **{name: value})
