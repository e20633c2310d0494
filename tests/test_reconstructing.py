"""The refit by least squares: against a solution written by hand, and what it leaves alone."""

import pytest
import torch
from architectures import Net, relative_error
from torch import nn

from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import refit, slim_down
from netclone.graph.operators import kind_of
from netclone.learning.data import Samples
from netclone.learning.reconstructing import RIDGE, _patches


def slimmed(net, images, kept):
    """The network without some channels of its first layer, before its refit."""
    groups = channel_groups(net, images[:2])
    return slim_down(groups, ChannelMask.from_kept(groups, {groups.groups[0].name: kept}), None)


def error(slim, net, images):
    """Mean square of what the slim network gives less what the full one does."""
    return float((slim.graph_module(images) - net(images)).detach().square().mean())


def samples(images):
    return Samples(images, torch.zeros(len(images), dtype=torch.long), "data")


def perceptron():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    return net, torch.randn(100, 6, dtype=torch.float64)


KEPT = [True, False, True, True]


def test_a_linear_layer_gets_the_ridge_solution_written_by_hand():
    net, images = perceptron()
    slim = slimmed(net, images, KEPT)
    slim = refit(slim, samples(images), None)
    with torch.no_grad():
        seen = torch.cat([torch.tanh(net[0](images))[:, KEPT], torch.ones(100, 1, dtype=torch.float64)], 1)
        old = torch.cat([net[2].weight[:, KEPT], net[2].bias[:, None]], 1)
        gram = seen.T @ seen
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(4, dtype=torch.float64)
        by_hand = torch.linalg.solve(gram + ridge, seen.T @ net(images) + ridge @ old.T).T
    state = slim.graph_module.state_dict()
    assert relative_error(state["2.weight"], by_hand[:, :3]) <= 1e-10
    assert relative_error(state["2.bias"], by_hand[:, 3]) <= 1e-10


def test_it_is_nearer_to_the_full_network_than_the_plain_copy():
    net, images = perceptron()
    slim = slimmed(net, images, KEPT)
    before = error(slim, net, images)
    slim = refit(slim, samples(images), None)
    assert error(slim, net, images) < before


def test_what_lost_no_input_stays_to_the_bit():
    net, images = perceptron()
    slim = slimmed(net, images, KEPT)
    slim = refit(slim, samples(images), None)
    assert torch.equal(slim.graph_module.get_parameter("0.weight"), net[0].weight[KEPT])
    whole = slimmed(net, images, [True] * 4)
    whole = refit(whole, samples(images), None)
    assert torch.equal(whole.graph_module.get_parameter("2.weight"), net[2].weight)


def test_a_channel_that_others_repeat_is_made_up_for():
    """The removed channel is twice another: with its weight moved there nothing is lost."""
    net, images = perceptron()
    net[1] = nn.Identity()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 2 * net[0].weight[0], 2 * net[0].bias[0]
    slim = slimmed(net, images, KEPT)
    slim = refit(slim, samples(images), None)
    assert relative_error(slim.graph_module(images), net(images)) <= 1e-3


@pytest.mark.parametrize("layer", [{"padding": 1}, {"stride": 2}, {"padding": "same", "dilation": 2}], ids=str)
@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_is_refitted_too(convolution, layer):
    torch.manual_seed(0)
    axes = [nn.Conv1d, nn.Conv2d, nn.Conv3d].index(convolution) + 1
    net = Net(
        lambda net, x: net.head(net.body(net.stem(x)).mean(tuple(range(2, 2 + axes)))),
        **{"stem": convolution(3, 4, 1), "body": convolution(4, 5, 3, **layer), "head": nn.Linear(5, 3)},
    )
    net, images = net.double().eval(), torch.randn(64, 3, *[8] * axes, dtype=torch.float64)
    slim = slimmed(net, images, KEPT)
    before = error(slim, net, images)
    slim = refit(slim, samples(images), None)
    assert error(slim, net, images) < before


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("layer", [{"padding": 1}, {"stride": 2}, {"padding": "same", "dilation": 2}], ids=str)
def test_every_position_of_a_map_is_read_once_in_as_many_batches(axes, layer):
    """What is read there, times the weight, is what the convolution gives."""
    torch.manual_seed(0)
    body = [nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1](2, 3, 3, bias=False, **layer).double()
    images = torch.randn(1, 2, *[7] * axes, dtype=torch.float64)
    with torch.no_grad():
        want = body(images)
    net = Net(lambda net, x: net.head(net.body(x).flatten(2).mean(2)), body=body, head=nn.Linear(3, 2).double()).eval()
    graph = channel_groups(net, images).graph_module
    node = next(node for node in graph.graph.nodes if kind_of(node.target) == "convolution")
    every, seen = 2, []
    for number in range(every**axes):
        patches, given = _patches(node, images, want, body.weight, every, number)
        torch.testing.assert_close(patches @ body.weight.detach().flatten(1).T, given)
        seen.append(given[..., 0].flatten())
    assert torch.equal(torch.cat(seen).sort().values, want[:, 0].flatten().sort().values)
