"""quick(): the same network in another form, which the original does not notice."""

import copy

import pytest
import timm
import torch
from torch import nn

from netclone.graph.capturing import capture
from netclone.graph.quickening import quick

aten = torch.ops.aten
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    """A network whose BatchNorms have statistics of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.eval()


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_quick_gives_the_same_up_to_rounding_and_leaves_its_graph_alone(name: str) -> None:
    graph = capture(settled(timm.create_model(name, num_classes=5)), IMAGES)
    before = {key: (tensor, tensor.clone(), tensor.stride()) for key, tensor in graph.state_dict().items()}
    text = str(graph.graph)
    faster = quick(graph, IMAGES)
    assert faster is not graph
    torch.testing.assert_close(faster(IMAGES), graph(IMAGES), rtol=1e-4, atol=1e-5)
    assert str(graph.graph) == text
    for key, tensor in graph.state_dict().items():
        same, bits, strides = before[key]
        assert tensor.data_ptr() == same.data_ptr() and torch.equal(tensor, bits) and tensor.stride() == strides


def test_quick_folds_batch_norms_and_lays_convolutions_out_with_channels_last() -> None:
    faster = quick(capture(settled(convolutions()), IMAGES), IMAGES)
    assert not [node for node in faster.graph.nodes if node.target is aten.batch_norm.default]
    weights = [p for p in faster.parameters() if p.dim() == 4]
    assert len(weights) == 2 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert faster(IMAGES).is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in faster.parameters())


class Views(nn.Module):
    """Reads its map channel after channel, which only one layout allows without a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).view(x.shape[0], -1))


@pytest.mark.parametrize("model", [Views(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))])
def test_a_network_that_cannot_be_faster_comes_back_itself(model: nn.Module) -> None:
    graph = capture(model.eval(), IMAGES)
    assert quick(graph, IMAGES) is graph


def test_a_form_that_gives_something_else_is_not_taken() -> None:
    graph = capture(settled(convolutions()), IMAGES)
    with torch.no_grad():  # infinite features: no two forms agree
        graph.get_parameter("0.weight").fill_(float("inf"))
    assert quick(copy.deepcopy(graph), IMAGES).state_dict().keys() == graph.state_dict().keys()
