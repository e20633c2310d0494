"""Dimensions of heads: what crosses heads can be removed beside them."""

import pytest
import torch
from architectures import random_mask, relative_error
from test_channels import NETWORKS, TOKENS, by_hand, make

from netclone.channels.blocks import residual_blocks
from netclone.channels.budgeting import Allocation, Measure, rounded
from netclone.channels.gates import Gated, gate_vector
from netclone.channels.grouping import channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract

aten = torch.ops.aten


def grouped(name):
    torch.manual_seed(0)
    forward, parts, shape, _ = NETWORKS[name]
    x = torch.randn(3, *shape, dtype=torch.float64)
    return channel_groups(make(forward, parts), x[:2]), x


@pytest.fixture(scope="module")
def groups():
    return grouped("attention by scaled_dot_product_attention")[0]


@pytest.mark.parametrize("name", ["attention by scaled_dot_product_attention", "attention by products"])
def test_a_row_goes_with_its_head_or_its_dimension(name):
    groups, x = grouped(name)
    flags = {"qkv": (1, 0, 1, 1), "qkv.dims": (1, 0, 0, 1), "qkv.dims#2": (0, 1, 1, 1)}
    mask = ChannelMask.from_kept(groups, flags)
    slim = extract(groups, mask)
    weight = groups.graph_module.qkv.weight.reshape(3, 4, 4, 6)[:, [0, 2, 3]]
    queries, values = weight[:2, :, [0, 3]], weight[2, :, 1:]
    assert torch.equal(slim.body.qkv.weight, torch.cat([queries.reshape(12, 6), values.reshape(9, 6)]))
    assert relative_error(slim(x), mask.apply(groups)(x)) <= 1e-12
    assert relative_error(slim(x), groups.graph_module(x)) > 1e-3


def test_the_scale_is_that_of_the_whole_heads(groups):
    slim = extract(groups, ChannelMask.from_kept(groups, {"qkv.dims": (True, False, True, False)}))
    whole = extract(groups, ChannelMask.from_kept(groups, {"qkv": (True, False, True, False)}))
    scales = [
        [
            node.kwargs.get("scale")
            for node in module.body.graph.nodes
            if node.target is aten.scaled_dot_product_attention.default
        ]
        for module in (slim, whole)
    ]
    assert scales == [[0.5], [None]]


@pytest.mark.parametrize(
    ("flags", "pads", "slices"),
    [
        ({"qkv.dims": (1, 0, 0, 1), "qkv.dims#2": (1, 1, 1, 1)}, 2, 0),
        ({"qkv.dims": (1, 1, 1, 1), "qkv.dims#2": (0, 0, 1, 0)}, 1, 1),
        ({"qkv.dims": (1, 0, 0, 1), "qkv.dims#2": (0, 1, 1, 0)}, 0, 0),
    ],
)
def test_the_kernel_gets_queries_and_values_of_one_width(groups, flags, pads, slices):
    x = torch.randn(3, *TOKENS, dtype=torch.float64)
    mask = ChannelMask.from_kept(groups, flags)
    slim = extract(groups, mask)
    nodes = [node.target for node in slim.body.graph.nodes]
    assert nodes.count(aten.constant_pad_nd.default) == pads
    slim_slices = nodes.count(aten.slice.Tensor) - [n.target for n in groups.graph_module.graph.nodes].count(
        aten.slice.Tensor
    )
    assert slim_slices == slices
    (kernel,) = (node for node in slim.body.graph.nodes if node.target is aten.scaled_dot_product_attention.default)
    assert len({operand.meta["val"].shape[-1] for operand in kernel.args[:3]}) == 1
    assert kernel.kwargs["scale"] == 0.5 or not pads
    assert relative_error(slim(x), mask.apply(groups)(x)) <= 1e-12


@pytest.mark.parametrize("flags", [{"qkv.dims": (1, 0, 0, 1)}, {"qkv.dims#2": (0, 0, 1, 0)}])
def test_what_fills_operands_up_is_passed_by_in_a_refit(groups, flags):
    x = torch.randn(40, *TOKENS, dtype=torch.float64)
    mask, labels = ChannelMask.from_kept(groups, flags), torch.arange(40) % groups.outputs
    plain, refitted = extract(groups, mask), extract(groups, mask, reconstruct=(x, labels))
    errors = [relative_error(slim(x), groups.graph_module(x)) for slim in (plain, refitted)]
    assert errors[1] <= errors[0]


def test_both_groups_of_a_row_are_told(groups):
    found = groups.explain("qkv.weight", 5)
    assert found.group == "qkv"
    assert found.because == "it is one of the 4 units of group 'qkv' and it is one of the 4 units of group 'qkv.dims'"
    one_head, _ = grouped("attention of one head")
    found = one_head.explain("qkv.weight", 9)
    assert found.because == "it is one of the 4 units of group 'qkv.dims#2'"
    assert [event.node for event in one_head.explain("qkv.weight", 1).events] == ["matmul"]


def test_heads_that_keep_their_dimensions_are_listed_with_reason_and_node():
    groups, _ = grouped("normalised queries and keys")
    assert [str(item) for item in groups.undivided] == [
        "qkv.weight (16 channels): normalises over the channels, so the dimensions of a head stay together "
        f"(node '{node}')"
        for node in ("layer_norm", "layer_norm_1")
    ]
    assert "prunable as whole heads only:" in str(groups)
    assert grouped("attention by products")[0].undivided == ()


def test_channels_that_both_labellings_find_are_not_added_twice():
    groups, _ = grouped("a parameter in a product")
    assert set(by_hand(groups)) == {"stem", "matrix"}
    assert not any(group.dims for group in groups.groups)


def test_gates_of_heads_and_dimensions_are_the_mask(groups):
    x = torch.randn(3, *TOKENS, dtype=torch.float64)
    mask = random_mask(groups, 0.5)
    gates = gate_vector([torch.tensor(flags).double() for _, flags in mask.kept])
    assert relative_error(Gated(groups)(gates, x), mask.apply(groups)(x)) <= 1e-12


def test_the_size_is_that_of_heads_times_dimensions(groups):
    allocation = Allocation(groups, Measure("params"))
    for seed in range(3):
        mask = random_mask(groups, 0.5, seed)
        kept = [sum(flags) for _, flags in mask.kept]
        assert allocation.size(kept) == sum(tensor.numel() for tensor in extract(groups, mask).parameters())


def test_dimensions_are_rounded_to_the_width_of_a_head(groups):
    by_name = {group.name: group for group in groups.groups}
    assert rounded(by_name["qkv.dims"], 3, 2) == 4
    assert rounded(by_name["qkv"], 3, 2) == 3  # a head is as wide as its four dimensions


def test_a_block_without_values_is_a_constant():
    groups, x = grouped("attention of one head in a block")
    (block,) = residual_blocks(groups)
    assert block.groups == ("qkv.dims", "qkv.dims#2")
    for names in (block.groups, block.groups[1:]):
        mask = ChannelMask.from_kept(groups, {name: (False,) * 4 for name in names})
        slim = extract(groups, mask)
        assert relative_error(slim(x), mask.apply(groups)(x)) <= 1e-12
        assert not any("qkv" in name for name, _ in slim.named_parameters())
