"""quick(): the same network in another form, which the original does not notice."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from netclone.graph.capturing import capture
from netclone.graph.quickening import for_gradients, quick

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


class Permutes(nn.Module):
    """Hands a convolution features in channels last, as the networks of ConvNeXt's kind do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.LayerNorm(5)
        self.down, self.head = nn.Conv2d(5, 11, 1, 2), nn.Linear(11, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.down(x).relu().mean((2, 3)))


def read_by_convolutions(graph: torch.fx.GraphModule, images: torch.Tensor) -> list[torch.Tensor]:
    """What the convolutions of a graph read: features and weights."""
    read: list[torch.Tensor] = []

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            if n.target is aten.conv2d.default:
                read.extend(self.env[used] for used in n.all_input_nodes[:2])
            return super().run_node(n)

    Watched(graph).run(images)
    return read


@pytest.mark.parametrize("model", [Permutes(), convolutions()])
def test_convolutions_with_gradients_read_the_usual_layout(model: nn.Module) -> None:
    graph = capture(settled(model).to(memory_format=torch.channels_last), IMAGES)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert not all(tensor.is_contiguous() for tensor in read_by_convolutions(graph, images))
    safe = for_gradients(graph)
    assert all(tensor.is_contiguous() for tensor in read_by_convolutions(safe, images))
    torch.testing.assert_close(safe(images), graph(images))
    assert list(safe.state_dict()) == list(graph.state_dict())


TRAINED = """
import torch
from test_quickening import Permutes
from netclone.graph.capturing import capture
from netclone.graph.quickening import for_gradients

torch.set_num_threads(1)
torch.manual_seed(0)
images = torch.randn(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
graph = for_gradients(capture(Permutes().eval(), images[:2]))
for _ in range(10):
    graph(images).square().mean().backward()
"""


def test_odd_widths_are_trained_without_harm() -> None:
    """In a process of its own: what this is about overwrites memory."""
    subprocess.run([sys.executable, "-c", TRAINED], check=True, cwd=Path(__file__).parent, timeout=120)
