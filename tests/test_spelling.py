"""Operators spelled in other ways, and their neighbours: slim, saved and loaded, whatever a model calls."""

import pytest
import torch
from architectures import Net, random_mask
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.cloning.modules import load, save
from netclone.graph.spelling import spell
from netclone.graph.tracing import position


def maps(count=2):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5


def network(middle, width=8, **parts):
    """A stem, what ``middle(net, maps)`` does to its maps ``(N, 8, 8, 8)``, and a head."""
    torch.manual_seed(0)
    usual = {"stem": nn.Conv2d(3, 8, 3, padding=1), "head": nn.Linear(width, 5)} | parts

    def forward(net, x):
        y = middle(net, net.stem(x).relu() + 0.1).to(x.dtype)
        return net.head(y if y.dim() == 2 else y.flatten(2).mean(2))

    return Net(forward, **usual).eval()


def masked_fill(net, y):
    z = y.clone()
    z[z > 0.5] = 0.0
    return z


def masked_rows(net, y):
    z = y * 2
    z[:, :, torch.tensor([True, False] * 4)] = 1.0
    return z


def put_rows(net, y):
    z = y * 2
    z[:, :, torch.tensor([0, 1])] = y[:, :, 2:4]
    return z


def vectors(y):
    return y.flatten(2).mean(2)


# What is computed of maps, and how many channels that gives.
CALLS = {
    "concat": (lambda net, y: torch.concat([y, -y], 1), 16),
    "concatenate": (lambda net, y: torch.concatenate([y, -y], 1), 16),
    "hstack": (lambda net, y: torch.hstack([y, -y]), 16),
    "column_stack": (lambda net, y: torch.column_stack([y, -y]), 16),
    "dstack": (lambda net, y: torch.dstack([y, -y]),),
    "clip": (lambda net, y: torch.clip(y, 0, 1),),
    "clip with tensors": (lambda net, y: torch.clip(y, torch.zeros(8, 1, 1), torch.ones(8, 1, 1)),),
    "clip in place": (lambda net, y: (y * 2).clip_(0, 1),),
    "moveaxis": (lambda net, y: torch.moveaxis(torch.moveaxis(y, 1, 3), 3, 1),),
    "moveaxis of several": (lambda net, y: torch.moveaxis(torch.moveaxis(y, (1, 2), (2, 3)), (2, 3), (1, 2)),),
    "movedim of several": (lambda net, y: torch.movedim(torch.movedim(y, (1, 2), (3, 1)), (3, 1), (1, 2)),),
    "swapaxes": (lambda net, y: y.swapaxes(1, 2).swapaxes(2, 1),),
    "swapdims": (lambda net, y: y.swapdims(1, 2).swapdims(2, 1),),
    "max of two": (lambda net, y: torch.max(y, 1 - y),),
    "min of two": (lambda net, y: torch.min(y, 1 - y),),
    "fmax and fmin": (lambda net, y: torch.fmax(y, 1 - y) + torch.fmin(y, 2 - y),),
    "multiply, subtract, divide": (lambda net, y: torch.true_divide(torch.subtract(torch.multiply(y, y), 1), 3),),
    "divide in two ways": (lambda net, y: torch.divide(y, 2) + torch.divide(y, 0.3, rounding_mode="floor"),),
    "negative, positive, absolute": (lambda net, y: torch.absolute(torch.negative(torch.positive(y)) + 0.3),),
    "comparisons by words": (lambda net, y: y * (torch.greater(y, 0.2) & torch.less_equal(y, 1) | y.not_equal(2)),),
    "square and rsqrt": (lambda net, y: torch.square(y) + torch.rsqrt(y + 1),),
    "arcus": (lambda net, y: torch.arctan(y) + torch.arcsinh(y) + torch.arctan2(y, y + 1) + torch.arccosh(y + 1),),
    "hyperbolic": (lambda net, y: torch.sinh(y) + torch.cosh(y) + torch.atanh(y / 9),),
    "remainders": (lambda net, y: y % 2 + torch.fmod(y, 0.3) + torch.remainder(y, y + 1),),
    "floor division": (lambda net, y: y // 0.3 + torch.floor_divide(y, 0.2),),
    "rounding": (lambda net, y: torch.trunc(y) + torch.fix(y) + torch.round(y, decimals=1) + torch.frac(y),),
    "nan_to_num": (lambda net, y: torch.nan_to_num(y),),
    "special functions": (lambda net, y: torch.special.expit(y) + torch.special.erfcx(y) + torch.special.i0e(y),),
    "logarithms": (lambda net, y: torch.log10(y + 1) + torch.logaddexp(y, -y) + torch.xlogy(y, y + 1),),
    "where with numbers": (lambda net, y: torch.where(y > 0.2, 1.0, y) + torch.where(y > 0.2, 1.0, 0.0),),
    "float_power": (lambda net, y: torch.float_power(y, 2),),
    "expand by broadcast": (lambda net, y: torch.broadcast_to(y.mean((2, 3), keepdim=True), y.shape),),
    "broadcast_tensors": (lambda net, y: torch.add(*torch.broadcast_tensors(y, y.mean(3, keepdim=True))),),
    "narrow": (lambda net, y: y.narrow(2, 1, 4),),
    "narrow of channels": (lambda net, y: y.narrow(1, 0, 4), 4),
    "hsplit": (lambda net, y: torch.hsplit(y, 2)[0] * torch.hsplit(y, 2)[1], 4),
    "dsplit": (lambda net, y: torch.dsplit(y, 2)[1],),
    "tile": (lambda net, y: torch.tile(y, (1, 2, 1, 1)), 16),
    "flips": (lambda net, y: y.flip(3) + torch.rot90(y, 1, (2, 3)),),
    "roll": (lambda net, y: y.roll(1, 2),),
    "ravel and unflatten": (lambda net, y: torch.ravel(y).reshape(y.shape).unflatten(2, (2, 4)).flatten(2, 3),),
    "unsqueeze at the end": (lambda net, y: torch.atleast_3d(y.unsqueeze(-1).squeeze(-1)),),
    "take_along_dim": (lambda net, y: torch.take_along_dim(y, y.argsort(2), 2),),
    "sort": (lambda net, y: y.sort(2)[0] + y.sort()[0] + torch.msort(y),),
    "topk and kthvalue": (lambda net, y: y.flatten(2).topk(3)[0] + y.flatten(2).kthvalue(2, keepdim=True)[0],),
    "sums on the way": (lambda net, y: y.cumsum(2) + y.cumprod(3) + y.cummax(2)[0] + y.logcumsumexp(3),),
    "diff": (lambda net, y: torch.diff(y, dim=2),),
    "tril and triu": (lambda net, y: y.tril() + y.triu(1),),
    "diagonal": (lambda net, y: torch.diagonal(y, dim1=2, dim2=3),),
    "var_mean": (lambda net, y: y - torch.var_mean(y, (2, 3), keepdim=True)[1],),
    "std_mean": (lambda net, y: y / (torch.std_mean(y, dim=(2, 3), keepdim=True)[0] + 1),),
    "median": (lambda net, y: y - y.flatten(2).median(2, keepdim=True)[0].unsqueeze(3),),
    "norms": (lambda net, y: y / (torch.linalg.norm(y, dim=3, keepdim=True) + torch.norm(y, dim=2, keepdim=True) + 1),),
    "vector norm": (lambda net, y: y / (torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True) + 1),),
    "nanmean": (lambda net, y: y - y.nanmean((2, 3), keepdim=True),),
    "aminmax": (lambda net, y: y - torch.aminmax(y, dim=2, keepdim=True)[0],),
    "count_nonzero": (lambda net, y: y + y.count_nonzero((2, 3))[:, :, None, None],),
    "cosine similarity of positions": (lambda net, y: y * F.cosine_similarity(y, y + 1, 2).unsqueeze(2),),
    "pairwise distance": (lambda net, y: F.pairwise_distance(y, y * 2, keepdim=True),),
    "pixel shuffle": (lambda net, y: F.pixel_shuffle(y.repeat(1, 4, 1, 1), 2),),
    "channel shuffle": (lambda net, y: F.channel_shuffle(y, 2),),
    "glu": (lambda net, y: F.glu(y, 1), 4),
    "glu of positions": (lambda net, y: F.glu(y),),
    "adaptive max pooling": (lambda net, y: F.adaptive_max_pool1d(y.flatten(2), 4),),
    "adaptive max pooling of volumes": (lambda net, y: F.adaptive_max_pool3d(y.unsqueeze(2), (1, 2, 2)),),
    "pooling with indices": (lambda net, y: F.max_pool2d(y, 2, return_indices=True)[0],),
    "pooling of sequences": (lambda net, y: F.max_pool1d(y.flatten(2), 2) + F.avg_pool1d(y.flatten(2), 2),),
    "pooling of volumes": (
        lambda net, y: F.max_pool3d(y.unsqueeze(2), (1, 2, 2)) + F.avg_pool3d(y[:, :, None], (1, 2, 2)),
    ),
    "power pooling": (lambda net, y: F.lp_pool2d(y, 2, 2) + F.lp_pool1d(y.flatten(2), 2, 4).unflatten(2, (4, 4)),),
    "grid_sample": (lambda net, y: F.grid_sample(y, net.grid.expand(y.size(0), -1, -1, -1), align_corners=False),),
    "grid from the image": (lambda net, y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1), align_corners=False),),
    "padding": (lambda net, y: F.pad(y, (1, 1, 1, 1), "replicate") + F.pad(y, (2, 0, 1, 1), "circular"),),
    "assignment by a mask": (masked_fill,),
    "assignment to some rows": (masked_rows,),
    "index_select": (lambda net, y: y.index_select(2, torch.tensor([1, 1, 3])),),
    "tensordot with a parameter": (lambda net, y: torch.mm(vectors(y), net.square),),
    "addmm": (lambda net, y: torch.addmm(net.bias, vectors(y), net.square),),
    "matmul by method": (lambda net, y: vectors(y).matmul(net.square),),
    "bmm": (lambda net, y: torch.bmm(y.flatten(2), y.flatten(2).mT),),
    "baddbmm": (
        lambda net, y: torch.baddbmm(y[:, 0], y.flatten(1, 2).unflatten(1, (8, 8))[:, 0], y[:, 1]).unsqueeze(1) + y,
    ),
    "einsum with dots": (lambda net, y: torch.einsum("...ij,...jk->...ik", y, y),),
    "einsum without an arrow": (lambda net, y: torch.einsum("bcij,jk", y, net.square),),
    "softmin": (lambda net, y: F.softmin(y, 2) + F.softmax(y, 3),),
    "zeros like": (lambda net, y: torch.cat([y, torch.zeros_like(y)], 1), 16),
    "fill": (lambda net, y: y + torch.full_like(y, 2.0),),
    "hardtanh and its like": (lambda net, y: F.hardtanh(y) + F.threshold(y, 0.1, 0) + F.tanhshrink(y) + F.rrelu(y),),
    "distances": (lambda net, y: torch.cdist(y, y + 1),),
    "distances in another norm": (lambda net, y: torch.cdist(y, y[:, :, :3], p=1),),
    "bilinear": (lambda net, y: F.bilinear(y, y + 1, net.cube, net.bias),),
    "local response": (lambda net, y: y + F.normalize(y, dim=2),),
}


TIED = {"bilinear", "bmm", "einsum without an arrow"}  # all channels meet each other there

PARTS = {
    "grid": nn.Parameter(torch.rand(1, 8, 8, 2) * 2 - 1),
    "square": nn.Parameter(torch.randn(8, 8)),
    "bias": nn.Parameter(torch.randn(8)),
    "cube": nn.Parameter(torch.randn(8, 8, 8)),
}


def parts_of(middle):
    return {name: part for name, part in PARTS.items() if name in middle.__code__.co_names}


def saved(model, images, folder):
    """Half of the units removed, whatever is removable: the slim network is the masked one, and is so once loaded."""
    groups = channel_groups(model, images)
    mask = random_mask(groups, 0.5)
    slim = extract(groups, mask)
    assert slim.certificate < 1e-9
    save(slim, folder / "slim.safetensors")
    again = load(folder / "slim.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(slim(images), mask.apply(groups)(images), rtol=1e-4, atol=1e-4)
        assert torch.equal(again(images), slim(images))
        more = torch.cat([images, images + 0.1, images])
        torch.testing.assert_close(groups.graph_module(more), model(more), rtol=1e-4, atol=1e-5)
    return groups


@pytest.mark.parametrize("name", CALLS)
def test_other_spellings_and_neighbours_are_slimmed_and_saved(name, tmp_path):
    middle, *width = CALLS[name]
    groups = saved(network(middle, *width, **parts_of(middle)), maps(), tmp_path)
    assert groups.labelling.without_rule == []
    assert len(groups) or name in TIED, [str(item) for item in groups.unprunable]


SHAPES = {1: (3, 12), 2: (3, 8, 8), 3: (3, 4, 4, 4)}
SIZED = {
    "convolution, same": lambda d: convolution(d, padding="same"),
    "convolution, valid": lambda d: convolution(d, padding="valid"),
    "convolution, circular": lambda d: convolution(d, padding=1, padding_mode="circular"),
    "transposed convolution": lambda d: of("ConvTranspose", d)(8, 8, 3, stride=2, output_padding=1),
    "nearest": lambda d: nn.Upsample(scale_factor=2),
    "nearest-exact": lambda d: nn.Upsample(size=5, mode="nearest-exact"),
    "linear": lambda d: nn.Upsample(scale_factor=2, mode={1: "linear", 2: "bilinear", 3: "trilinear"}[d]),
    "maximum": lambda d: of("MaxPool", d)(2),
    "average": lambda d: of("AvgPool", d)(2),
    "power": lambda d: of("LPPool", d)(2, 2),
    "adaptive maximum": lambda d: of("AdaptiveMaxPool", d)(2),
    "adaptive average": lambda d: of("AdaptiveAvgPool", d)(2),
    "batch norm": lambda d: of("BatchNorm", d)(8),
    "instance norm": lambda d: of("InstanceNorm", d)(8, affine=True),
    "reflection": lambda d: of("ReflectionPad", d)(1),
    "replication": lambda d: of("ReplicationPad", d)(1),
    "circular": lambda d: of("CircularPad", d)(1),
    "dropout": lambda d: nn.FeatureAlphaDropout(),
}


def of(name, dimensions):
    return getattr(nn, f"{name}{dimensions}d")


def convolution(dimensions, **options):
    return of("Conv", dimensions)(8, 8, 3, **options)


@pytest.mark.parametrize("dimensions", SHAPES)
@pytest.mark.parametrize("name", SIZED)
def test_layers_of_one_two_and_three_dimensions(name, dimensions, tmp_path):
    torch.manual_seed(1)
    stem, images = of("Conv", dimensions)(3, 8, 1), torch.rand(2, *SHAPES[dimensions])
    groups = saved(network(lambda net, y: net.layer(y), stem=stem, layer=SIZED[name](dimensions)), images, tmp_path)
    assert len(groups) and groups.labelling.without_rule == []


def looked_up(net, y):
    return y + net.table(torch.arange(8, device=y.device)).expand(y.size(0), -1, -1).mT.unsqueeze(3)


LAYERS = {
    "embedding of a constant": (looked_up, {"table": nn.Embedding(8, 8)}),
    "embedding of the input": (lambda net, y: net.table(y.mean(2).argmax(1)).mT, {"table": nn.Embedding(8, 8)}),
    "bilinear": (lambda net, y: net.layer(y, y), {"layer": nn.Bilinear(8, 8, 6)}),
    "a product with a vector": (lambda net, y: torch.mv(vectors(y), net.bias)[:, None], {"bias": PARTS["bias"]}),
    "an elman cell": (lambda net, y: net.cell(vectors(y)), {"cell": nn.RNNCell(8, 6)}),
    "a gated cell": (lambda net, y: net.cell(vectors(y)), {"cell": nn.GRUCell(8, 6)}),
    "a cell with memory": (lambda net, y: net.cell(vectors(y))[1], {"cell": nn.LSTMCell(8, 6)}),
    "several products": (lambda net, y: torch.linalg.multi_dot([vectors(y), net.a, net.a]), {"a": PARTS["square"]}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_parameters_of_their_own(name, tmp_path):
    middle, parts = LAYERS[name]
    model = network(middle, **parts)
    with torch.no_grad():
        width = middle(model, model.stem(maps())).shape[1]
    saved(network(middle, width, **parts), maps(), tmp_path)


IN_PLACE = {
    "floor division": lambda y: y.floor_divide_(0.3),
    "floor division by a tensor": lambda y: y.floor_divide_(y + 1),
    "a power": lambda y: y.double().float_power_(torch.tensor(2.0)),
    "a comparison": lambda y: y.ne_(0.2),
    "by another dtype": lambda y: y.mul_(y.double()),
    "slopes": lambda y: F.rrelu_(y),
    "arcus": lambda y: torch.arctan_(y),
    "a fraction": lambda y: torch.fix_(y * 3),
    "bits": lambda y: torch.bitwise_and((y > 0.1), (y > 0)).__iand__(y < 0.5).float(),
    "a clipped product": lambda y: torch.clip_(y, 0, 1).multiply_(2).subtract_(1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_works_in_place_keeps_its_dtype_and_is_slimmed(name, tmp_path):
    groups = saved(network(lambda net, y: IN_PLACE[name](y * 2)), maps(), tmp_path)
    assert len(groups) and groups.labelling.without_rule == []


# Operators that netclone has no rule for, and the name of one of those that it keeps.
WHOLE = {
    "fold": (lambda net, y: F.fold(y.flatten(2)[:, :, :9], (4, 4), (2, 2)), "col2im", 2),
    "scatter": (lambda net, y: y.scatter(2, torch.zeros_like(y, dtype=torch.long), y * 2), "scatter.src", 8),
    "scatter_add": (lambda net, y: y.scatter_add(2, torch.zeros_like(y, dtype=torch.long), y), "scatter_add", 8),
    "index_add": (lambda net, y: y.index_add(2, torch.tensor([0, 1]), y[:, :, 2:4]), "index_add", 8),
    "buckets": (lambda net, y: torch.bucketize(y, torch.tensor([0.2, 0.5])).to(y.dtype), "bucketize.Tensor", 8),
    "renorm": (lambda net, y: torch.renorm(y, 2, 1, 1.0), "renorm", 8),
    "cross": (lambda net, y: torch.linalg.cross(y[:, :3], y[:, 3:6], dim=1), "linalg_cross", 3),
    "inverse": (lambda net, y: torch.linalg.inv(y + 20 * torch.eye(8)), "linalg_inv", 8),
    "quantile": (lambda net, y: y - torch.quantile(y, 0.3, dim=2, keepdim=True), "", 8),
    "bits": (lambda net, y: y.view(torch.int32).remainder(7).to(y.dtype), "view.dtype", 8),
    "put": (put_rows, "index_put", 8),
}


@pytest.mark.parametrize("name", WHOLE)
def test_any_other_operator_keeps_its_channels_is_listed_and_saved(name, tmp_path):
    middle, kept, width = WHOLE[name]
    model, images = network(middle, width), maps()
    groups = channel_groups(model, images)
    assert any(kept in operator for _, operator in groups.labelling.without_rule) or not kept
    assert [item for item in groups.unprunable if item.name == "stem.weight"]
    if name != "bits":  # has no float64, in which slim and masked networks are compared
        saved(model, images, tmp_path)


def test_what_a_spelling_is_made_of_stands_where_it_stood():
    class Joined(nn.Module):
        def forward(self, y):
            return torch.concatenate([y, y + 1], 1)

    model = network(lambda net, y: net.joined(y), 16, joined=Joined())
    groups = channel_groups(model, maps())
    graph = groups.graph_module
    node = position(graph, "joined")
    assert (node.target, node.name) == (torch.ops.aten.cat.default, "concatenate")
    assert len(extract(groups, random_mask(groups, 0.5), at="joined").spec.input_shape) == 3


def test_sizes_that_depend_on_the_batch_are_sizes_of_inputs():
    model = network(lambda net, y: torch.ravel(y).reshape(y.shape))
    graph = channel_groups(model, maps()).graph_module
    assert not any("ravel" in str(node.target) for node in graph.graph.nodes)
    for count in (1, 3, 5):
        with torch.no_grad():
            torch.testing.assert_close(graph(maps(count)), model(maps(count)))


def test_what_is_not_made_of_operators_with_rules_stays_as_it_is():
    model = network(lambda net, y: y - torch.quantile(y, 0.3, dim=2, keepdim=True))
    graph = channel_groups(model, maps()).graph_module
    assert [str(node.target) for node in graph.graph.nodes if "quantile" in str(node.target)] == [
        "aten.quantile.scalar"
    ]
    assert not [node for node in graph.graph.nodes if "sort" in str(node.target)]


@pytest.mark.parametrize("assign", ["several numbers", "accumulated"])
def test_a_mask_that_stands_for_no_where_is_left_alone(assign):
    graph = fx.Graph()
    values = [torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.bool), torch.zeros(1 if assign == "accumulated" else 3)]
    with FakeTensorMode() as mode:
        nodes = [graph.placeholder(name) for name in "xmv"]
        for node, value in zip(nodes, values, strict=True):
            node.meta["val"] = mode.from_tensor(value)
        x, m, v = nodes
        put = graph.call_function(torch.ops.aten.index_put.default, (x, [m], v, assign == "accumulated"))
        put.meta["val"] = x.meta["val"]
    graph.output(put)
    assert spell(graph) == {} and put in graph.nodes and len(graph.nodes) == 5
