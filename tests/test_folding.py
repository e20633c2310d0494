import torch
from torch import Tensor, nn

import netclone
from netclone.graph.capturing import capture
from netclone.graph.folding import fold_batch_norms


class Net(nn.Module):
    """Two foldable BatchNorms (one convolution has no bias) and one that shares its convolution with another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, bias=False)
        self.b = nn.Conv2d(6, 6, 3, groups=6)
        self.c = nn.Conv2d(6, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(4)])
        for norm in self.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.a(x)).relu()
        x = self.norms[1](self.b(x)).relu()
        x = self.c(x)
        return (self.norms[2](x) + x).mean((2, 3))


def test_what_can_be_folded_is_and_the_function_stays() -> None:
    model = Net().double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    graph_module = capture(model, images[:2])
    assert fold_batch_norms(graph_module) == 2
    torch.testing.assert_close(graph_module(images), model(images), rtol=0, atol=1e-12)


def test_an_extracted_module_can_be_folded_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Net().eval()
    images = torch.randn(3, 3, 8, 8)
    groups = netclone.channel_groups(model, images[:2])
    mask = netclone.localize(groups, method="magnitude", keep=0.5)
    plain = netclone.extract(groups, mask)
    folded = netclone.extract(groups, mask, fold_batch_norm=True)
    torch.testing.assert_close(folded(images), plain(images), rtol=1e-4, atol=1e-5)
    assert len(folded.body.graph.nodes) < len(plain.body.graph.nodes)
    netclone.save(folded, tmp_path / "folded.safetensors")
    assert torch.equal(netclone.load(tmp_path / "folded.safetensors")(images), folded(images))
