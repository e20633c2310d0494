import timm
import torch
from torch import Tensor, nn

import netclone
from netclone.cloning.placing import Place, candidates, features_at, matching, places


class Forked(nn.Module):
    """One stage that everything passes, a fork that meets again, and a stage with a way round it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.join = nn.Conv2d(4, 4, 1)
        self.skipped = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.join(self.left(x) + self.right(x))
        x = x + self.skipped(x)
        return self.head(x.mean((2, 3)))


def test_places_are_where_all_paths_meet() -> None:
    traced = netclone.trace(Forked(), torch.randn(2, 3, 8, 8))
    assert [place.at for place in places(traced)] == ["stem", "join"]


def test_candidates_run_from_deep_to_shallow_and_name_stages() -> None:
    traced = netclone.trace(timm.create_model("resnet18"), torch.randn(2, 3, 64, 64))
    found = [place.at for place in candidates(traced)]
    assert found == ["layer4", "layer3", "layer2", "layer1", "act1"]


def test_transformer_blocks_are_candidates() -> None:
    traced = netclone.trace(timm.create_model("test_vit"))
    assert [place.at for place in candidates(traced, most=3)] == ["norm", "blocks.0", "patch_embed.proj"]


def test_reading_the_batch_size_is_no_way_round() -> None:
    """Every reshape of an exported transformer reads the batch size off the input; its blocks are cut points still."""
    captured = netclone.channel_groups(timm.create_model("test_vit")).graph_module
    found = [place.at for place in places(captured)]
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(found)


def test_matching_prefers_the_same_grid_then_the_same_depth() -> None:
    sources = (
        Place("early", "a", (8, 16, 16), 0.1),
        Place("middle", "b", (16, 8, 8), 0.4),
        Place("late", "c", (16, 8, 8), 0.8),
    )
    assert matching(Place("t", "t", (32, 8, 8), 0.7), sources).at == "late"
    assert matching(Place("t", "t", (32, 8, 8), 0.3), sources).at == "middle"
    assert matching(Place("t", "t", (256, 32), 0.9), sources).at == "early"


def test_features_are_those_of_the_model() -> None:
    model = Forked().eval()
    traced = netclone.trace(model, torch.randn(2, 3, 8, 8))
    images = torch.randn(5, 3, 8, 8)
    seen = features_at(traced, images, ["stem", "head"], batch_size=2)
    assert torch.equal(seen["stem"], torch.cat([model.stem(part) for part in images.split(2)]))
    assert torch.equal(seen["head"], torch.cat([model(part) for part in images.split(2)]))
