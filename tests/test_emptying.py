"""Groups that lose all of their units: what they fed becomes a constant, and the layers are gone. Exact, or refused."""

import dataclasses
import functools

import pytest
import timm
import torch
from architectures import Net, relative_error
from torch import nn

import netclone
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import certify_slim, refit, slim_down
from netclone.errors import CertificateError, MaskError
from netclone.learning.data import Samples


def samples():
    return Samples(MORE.double(), torch.zeros(5, dtype=torch.long), "data")


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def built(function, **parts):
    """A network in float64 around a residual stream of 4 channels, with norms that are not those of a fresh one."""
    torch.manual_seed(0)
    net = Net(function, stem=nn.Conv2d(3, 4, 3, padding=1), head=nn.Linear(4, 5), **parts).double().eval()
    for tensor in (*net.parameters(), *(buffer for buffer in net.buffers() if buffer.dim())):
        nn.init.uniform_(tensor, 0.1, 1) if tensor.dim() == 1 else nn.init.normal_(tensor, std=0.5)
    return net


@functools.cache
def groups_of(network):
    return channel_groups(network(), IMAGES.double(), through_norms=True)


def without(network, *names):
    """The groups of a network, and a mask that keeps no unit of some and all of the others."""
    groups = network if isinstance(network, ChannelGroups) else groups_of(network)
    return groups, ChannelMask.from_kept(groups, {name: [False] * groups[name].size for name in names})


def pooled(net, x):
    return net.head(x.mean((2, 3)))


def basic():
    def forward(net, x):
        x = net.stem(x).relu()
        out = net.norm2(net.conv2(net.norm1(net.conv1(x)).relu()))
        out += x
        return pooled(net, out.relu())

    return built(
        forward,
        conv1=nn.Conv2d(4, 6, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 4, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(4),
    )


def test_a_residual_block_disappears_but_for_what_its_last_norm_makes_of_zeros():
    net = basic()
    groups, mask = without(basic, "conv1")
    module = netclone.extract(groups, mask)
    names = {name.partition(".")[2] for name in module.state_dict()}
    assert names == {"stem.weight", "stem.bias", "head.weight", "head.bias", "batch_norm_1_constant"}
    with torch.no_grad():
        norm = net.norm2
        constant = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        expected = pooled(net, (net.stem(MORE.double()).relu() + constant[:, None, None]).relu())
    assert relative_error(module(MORE.double()), expected) < 1e-14
    assert module.certificate < 1e-14
    assert dict((name, kept) for name, kept, _ in module.spec.kept)["conv1"] == 0


def _bottleneck():
    def forward(net, x):
        x = net.stem(x)
        hidden = net.conv2(net.conv1(x).relu()).relu()
        return pooled(net, x + net.norm(net.conv3(hidden)))

    parts = {
        "conv1": nn.Conv2d(4, 3, 1),
        "conv2": nn.Conv2d(3, 5, 3, padding=1),
        "conv3": nn.Conv2d(5, 4, 1),
        "norm": nn.BatchNorm2d(4),
    }
    return built(forward, **parts)


def _convnext():
    def forward(net, x):
        x = net.stem(x)
        out = net.fc2(net.fc1(net.norm(net.spatial(x).permute(0, 2, 3, 1))).sigmoid())
        return pooled(net, x + (out * net.scale).permute(0, 3, 1, 2))

    parts = {
        "spatial": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "norm": nn.LayerNorm(4),
        "fc1": nn.Linear(4, 7),
        "fc2": nn.Linear(7, 4),
        "scale": nn.Parameter(torch.rand(4)),
    }
    return built(forward, **parts)


def _transformer():
    def forward(net, x):
        x = net.stem(x).flatten(2).transpose(1, 2)
        count, tokens, width = x.shape
        q, k, v = net.qkv(net.norm1(x)).reshape(count, tokens, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(count, tokens, width)
        x = x + net.scale * net.proj(seen)
        x = x + net.fc2(net.hidden(net.fc1(net.norm2(x)).relu()))
        return net.head(x.mean(1))

    parts = {
        "norm1": nn.LayerNorm(4),
        "qkv": nn.Linear(4, 12),
        "proj": nn.Linear(4, 4),
        "scale": nn.Parameter(torch.rand(4)),
        "norm2": nn.LayerNorm(4),
        "fc1": nn.Linear(4, 7),
        "hidden": nn.LayerNorm(7),
        "fc2": nn.Linear(7, 4),
    }
    return built(forward, **parts)


def _inverted():
    def forward(net, x):
        x = net.stem(x)
        out = net.norm(net.spatial(net.expand(x).relu())).relu()
        gate = net.up(net.down(out.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return pooled(net, x + net.project(out * gate))

    parts = {
        "expand": nn.Conv2d(4, 8, 1),
        "spatial": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "norm": nn.BatchNorm2d(8),
        "down": nn.Conv2d(8, 2, 1),
        "up": nn.Conv2d(2, 8, 1),
        "project": nn.Conv2d(8, 4, 1, bias=False),
    }
    return built(forward, **parts)


def _others():
    """A transposed convolution, a bare matrix, joined channels, and a batch size that is read off what goes."""

    def forward(net, x):
        x = net.stem(x)
        x = x + net.wider(net.inner(x).relu())
        hidden = net.first(x.mean((2, 3))).relu()
        flat = (hidden.view(hidden.shape[0], -1) @ net.matrix) * 2
        x = x + flat.view(hidden.shape[0], 4, 1, 1)
        return net.joint(torch.cat([net.side(x).relu(), x], 1).mean((2, 3)))

    parts = {
        "inner": nn.Conv2d(4, 3, 1),
        "wider": nn.ConvTranspose2d(3, 4, 1),
        "first": nn.Linear(4, 6),
        "matrix": nn.Parameter(torch.randn(6, 4)),
        "side": nn.Conv2d(4, 3, 3, padding=1),
        "joint": nn.Linear(7, 5),
    }
    return built(forward, **parts)


CASES = [
    (basic, ["conv1"], "conv norm"),
    (_bottleneck, ["conv1"], "conv1 conv2 conv3 norm"),
    (_bottleneck, ["conv2"], "conv1 conv2 conv3 norm"),
    (_bottleneck, ["conv1", "conv2"], "conv1 conv2 conv3 norm"),
    (_convnext, ["fc1"], "spatial norm fc1 fc2 scale"),
    (_transformer, ["qkv"], "norm1 qkv proj scale"),
    (_transformer, ["fc1"], "norm2 fc1 hidden fc2"),
    (_transformer, ["qkv", "fc1"], "norm1 qkv proj scale norm2 fc1 hidden fc2"),
    (_inverted, ["expand"], "expand spatial norm down up project"),
    (_inverted, ["down"], "down up"),
    (_others, ["inner"], "inner wider"),
    (_others, ["first"], "first matrix"),
    (_others, ["side"], "side"),
    (_others, ["side", "inner", "first"], "side inner wider first matrix"),
]


@pytest.mark.parametrize(("network", "names", "gone"), CASES, ids=[f"{n.__name__} {' '.join(g)}" for n, g, _ in CASES])
def test_the_slim_network_has_none_of_the_layers_and_equals_the_masked_one(network, names, gone, tmp_path):
    groups, mask = without(network, *names)
    module = netclone.extract(groups, mask)
    assert module.certificate < 1e-13
    left = {name.removeprefix("body.") for name in module.state_dict()}
    assert not [name for name in left if name.startswith(tuple(gone.split()))]
    masked = mask.apply(groups)
    for images in (IMAGES.double(), MORE.double(), MORE[:1].double()):
        assert relative_error(module(images), masked(images)) < 1e-13
    netclone.save(module, tmp_path / "slim.safetensors")
    assert torch.equal(netclone.load(tmp_path / "slim.safetensors")(MORE.double()), module(MORE.double()))


def test_in_the_weights_own_dtype_constants_are_rounded_once():
    groups = channel_groups(basic().float(), IMAGES)
    _, mask = without(groups, "conv1")
    module = netclone.extract(groups, mask)
    assert module.certificate < 1e-14  # compared before rounding
    assert module.body.batch_norm_1_constant.dtype == torch.float32
    exact = netclone.extract(*without(channel_groups(basic().float().double(), IMAGES.double()), "conv1"))
    assert torch.equal(module.body.batch_norm_1_constant, exact.body.batch_norm_1_constant.float())


def test_a_module_cut_behind_the_block_has_no_constant():
    groups, mask = without(basic, "conv1")
    module = netclone.extract(groups, mask, at="relu_2", classes=[3, 1])
    assert {name.partition(".")[2] for name in module.state_dict()} == {"head.weight", "head.bias"}
    assert module.certificate < 1e-14


def test_a_source_of_the_libraries_loses_a_block():
    torch.manual_seed(0)
    groups = channel_groups(timm.create_model("test_resnet", num_classes=4))
    module = netclone.extract(*without(groups, "layer3.0.conv1", "layer3.0.conv2"), classes=[1, 3])
    assert {name.split(".")[3] for name, _ in module.named_parameters() if "layer3" in name} == {"downsample"}
    assert module.certificate < 1e-14


def _bordered():
    """The last layer of the block pads what the one before computes."""

    def forward(net, x):
        x = net.stem(x)
        return pooled(net, x + net.conv3(net.conv2(net.conv1(x)).relu()))

    return built(forward, conv1=nn.Conv2d(4, 3, 1), conv2=nn.Conv2d(3, 5, 1), conv3=nn.Conv2d(5, 4, 3, padding=1))


def _beside():
    def forward(net, x):
        x = net.stem(x)
        return net.joint(torch.cat([net.conv2(net.conv1(x)), x], 1).mean((2, 3)))

    return built(forward, conv1=nn.Conv2d(4, 3, 1), conv2=nn.Conv2d(3, 4, 1), joint=nn.Linear(8, 5))


def _unknown():
    def forward(net, x):
        x = net.stem(x)
        return pooled(net, x + torch.cat([torch.linalg.cross(x[:, :3], net.conv2(net.conv1(x)), dim=1), x[:, 3:]], 1))

    return built(forward, conv1=nn.Conv2d(4, 5, 1), conv2=nn.Conv2d(5, 3, 1))


REFUSED = [
    (
        _bordered,
        ["conv1"],
        r"group 'conv1' \(3 units\): keep at least one, because node 'conv2d_3': computes another",
    ),
    (_beside, ["conv1"], r"'conv1' \(3 units\): .* because node 'cat': would read a constant beside other channels"),
    (_unknown, ["conv1"], r"because node 'linalg_cross': operator aten.linalg_cross.default has no rule"),
    (basic, ["stem"], r"because node 'output': the output would not depend on the image"),
    (_bottleneck, ["conv1", "stem"], r"group 'stem' \(4 units\) and group 'conv1' \(3 units\): .* 'output'"),
]


@pytest.mark.parametrize(("network", "names", "why"), REFUSED, ids=[network.__name__ for network, _, _ in REFUSED])
def test_what_is_not_exactly_constant_keeps_a_unit(network, names, why):
    with pytest.raises(MaskError, match=why):
        without(network, *names)


def test_two_groups_may_lose_together_what_one_cannot_lose_alone():
    groups, mask = without(_bordered, "conv1", "conv2")
    assert netclone.extract(groups, mask).certificate < 1e-14


def test_groups_that_keep_a_unit_are_listed_with_the_reason():
    groups, _ = without(_bordered)
    listed = {item.name: str(item) for item in groups.last_units()}
    assert listed.keys() == {"stem", "conv1"}
    assert listed["conv1"] == (
        "conv1 (1 channels): computes another value at the borders from what would be constant (node 'conv2d_3')"
    )


def test_a_refit_gives_the_constant_the_mean_of_what_the_block_computed():
    net = basic()
    groups, mask = without(basic, "conv1")
    slimmed = refit(slim_down(groups, mask, None), samples(), None)
    with torch.no_grad():
        block = net.norm2(net.conv2(net.norm1(net.conv1(net.stem(MORE.double()).relu())).relu()))
    constant = slimmed.graph_module.batch_norm_1_constant.detach()
    torch.testing.assert_close(constant, block.mean((0, 2, 3))[:, None, None])


@pytest.mark.parametrize("network", [_convnext, _inverted, _others])
def test_layers_behind_the_constant_are_refitted_too(network):
    names = {_convnext: ["fc1"], _inverted: ["down"], _others: ["side", "first"]}[network]
    groups, mask = without(network, *names)
    slimmed = slim_down(groups, mask, None)
    refitted = refit(slimmed, samples(), None)
    want = groups.graph_module(MORE.double())
    errors = [float((one.graph_module(MORE.double()) - want).detach().square().mean()) for one in (slimmed, refitted)]
    assert errors[1] < errors[0]


def test_a_constant_that_is_another_is_not_certified():
    groups, mask = without(basic, "conv1")
    slimmed = slim_down(groups, mask, None)
    plain = {**slimmed.plain, "batch_norm_1_constant": slimmed.plain["batch_norm_1_constant"] + 1e-6}
    with pytest.raises(CertificateError, match="is not the constant that node 'batch_norm_1' becomes"):
        certify_slim(dataclasses.replace(slimmed, plain=plain), None)


def _linear():
    """A block without a nonlinearity before another layer."""

    def forward(net, x):
        x = net.stem(x)
        return net.head(net.after(x + net.outer(net.inner(x))).relu().mean((2, 3)))

    parts = {"inner": nn.Conv2d(4, 3, 1), "outer": nn.Conv2d(3, 4, 1), "after": nn.Conv2d(4, 4, 3)}
    return built(forward, **parts)


def test_the_next_layers_take_over_what_a_block_computed_linearly():
    groups, mask = without(_linear, "inner")
    slimmed = slim_down(groups, mask, None)
    want = groups.graph_module(MORE.double())
    assert relative_error(slimmed.graph_module(MORE.double()), want) > 0.1
    refitted = refit(slimmed, samples(), None)
    assert relative_error(refitted.graph_module(MORE.double()), want) < 1e-3


def test_layers_before_the_block_are_left_alone():
    groups, mask = without(_linear, "inner")
    slimmed = slim_down(groups, mask, None)
    refitted = refit(slimmed, samples(), None)
    changed = {
        name
        for name, tensor in refitted.graph_module.state_dict().items()
        if not torch.equal(tensor, slimmed.plain[name])
    }
    assert changed == {"after.weight", "after.bias", "head.weight", "head.bias", "conv2d_2_constant"}
