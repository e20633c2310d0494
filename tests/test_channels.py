"""Channel groups of small networks, each written down by hand, and the numeric check that they are right."""

import logging

import pytest
import torch
from architectures import Net, lost_weights, random_mask, relative_error, untouched
from torch import nn
from torch.nn import functional as F

from netclone.channels.grouping import channel_groups
from netclone.cloning.extracting import extract
from netclone.errors import ArgumentError, OutputError

IMAGE = (3, 8, 8)
TOKENS = (5, 6)
HEAD = "head.weight:1"


def conv(before, after, size=3, **options):
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def pooled(net, x):
    """Mean over positions (N, C, H, W) or tokens (N, T, C), then the classifier."""
    return net.head(x.mean((2, 3)) if x.dim() == 4 else x.mean(1))


def split_heads(x, heads=4):
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)


def fused_qkv(net, x):
    return net.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)


# ---------------------------------------------------------------- the networks, and their groups by hand
# Each entry: forward, parts, input shape, {group: (units, its slices as "parameter:axis" or "parameter:axis*slices")}


def residual(net, x):
    x = net.stem(x)
    return pooled(net, x + net.body(x.relu()))


def gated(net, x):
    x = net.stem(x)
    return pooled(net, x * net.expand(net.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


def chunked(net, x):
    first, second = net.stem(x).chunk(2, 1)
    return pooled(net, torch.cat([net.body(first), second], 1))


def split_unevenly(net, x):
    first, second = net.stem(x).split([2, 6], 1)
    return pooled(net, torch.cat([second, net.body(first)], 1))


def sliced(net, x):
    x = net.stem(x)
    return pooled(net, net.first(x[:, :3]) + net.second(x[:, 3:]))


def padded_shortcut(net, x):
    x = net.stem(x)
    return pooled(net, net.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def view_shuffle(net, x):
    x = net.stem(x)
    n, c, h, w = x.shape
    return pooled(net, net.body(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))


def matmul_attention(net, x):
    q, k, v = fused_qkv(net, x)
    return pooled(net, net.proj(merge_heads((q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v)))


def product_attention(net, x):
    q, k, v = fused_qkv(net, x)
    return pooled(net, net.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))


def einsum_attention(net, x):
    q, k, v = (split_heads(part(x)) for part in (net.q, net.k, net.v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return pooled(net, net.proj(merge_heads(torch.einsum("bhqk,bhkd->bhqd", scores, v))))


def attention(net, x, changed):
    """Queries and keys are changed before they are multiplied."""
    q, k, v = fused_qkv(net, x)
    return pooled(net, net.proj(merge_heads(F.scaled_dot_product_attention(changed(q), changed(k), v))))


def normalised_attention(net, x):
    return attention(net, x, net.norm)


def rotated(net, q, turned):
    return q * net.cos + turned.reshape(q.shape) * net.sin


def one_head(net, x):
    q, k, v = net.qkv(x).chunk(3, 2)
    return (q @ k.mT * 0.5).softmax(-1) @ v


def attention_between_dimensions(net, x):
    q, k, v = (part.mT for part in fused_qkv(net, x))
    return pooled(net, net.proj(merge_heads(((q @ k.mT).softmax(-1) @ v).mT)))


def grouped_query_attention(net, x):
    q, k, v = split_heads(net.q(x)), split_heads(net.k(x), 2), split_heads(net.v(x), 2)
    return pooled(net, net.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))))


def relative_position_attention(net, x):
    q, k, v = fused_qkv(net, x)
    offsets = torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4
    bias = net.table[offsets.reshape(-1)].view(5, 5, 4).permute(2, 0, 1)
    return pooled(net, net.proj(merge_heads((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v)))


def class_token(net, x):
    x = torch.cat([net.token.expand(x.shape[0], -1, -1), net.embed(x)], 1) + net.positions
    return net.head(net.mlp(x).relu()[:, 0])


def first_block_of_a_transformer(net, x):
    x = torch.cat([net.token.expand(x.shape[0], -1, -1), net.embed(x)], 1) + net.positions
    q, k, v = fused_qkv(net, net.norm(x))
    return net.head((x + net.proj(merge_heads(F.scaled_dot_product_attention(q, k, v))))[:, 0])


HEADS = {"qkv": (4, "qkv.weight:0*12 qkv.bias:0*12 proj.weight:1*4")}
QUERIES = {"qkv.dims": (4, "qkv.weight:0*8 qkv.bias:0*8")}
VALUES = (4, "qkv.weight:0*4 qkv.bias:0*4 proj.weight:1*4")
PROJECTION = {"proj": (6, f"proj.weight:0 proj.bias:0 {HEAD}")}
ATTENTION = {**HEADS, **QUERIES, "qkv.dims#2": VALUES, **PROJECTION}
ONE_HEAD = {
    "qkv.dims": (4, "qkv.weight:0*2 qkv.bias:0*2"),
    "qkv.dims#2": (4, "qkv.weight:0 qkv.bias:0 proj.weight:1"),
}
SEPARATE_ATTENTION = {
    "q": (4, "q.weight:0*4 q.bias:0*4 k.weight:0*4 k.bias:0*4 v.weight:0*4 v.bias:0*4 proj.weight:1*4"),
    "q.dims": (4, "q.weight:0*4 q.bias:0*4 k.weight:0*4 k.bias:0*4"),
    "v.dims": (4, "v.weight:0*4 v.bias:0*4 proj.weight:1*4"),
    **PROJECTION,
}
ATTENTION_PARTS = {"qkv": (nn.Linear, 6, 48), "proj": (nn.Linear, 16, 6), "head": (nn.Linear, 6, 5)}
STEM = "stem.weight:0 stem.bias:0"
BODY = {"body": (8, f"body.weight:0 body.bias:0 {HEAD}")}
TO_BODY = {"stem": (8, f"{STEM} body.weight:1"), **BODY}

NETWORKS = {
    "residual": (
        residual,
        {"stem": (conv, 3, 8), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} body.weight:1 body.weight:0 body.bias:0 {HEAD}")},
    ),
    "depthwise": (
        lambda net, x: pooled(net, net.body(net.norm(net.depthwise(net.stem(x))))),
        {
            "stem": (conv, 3, 8),
            "depthwise": (lambda: conv(8, 8, groups=8),),
            "norm": (nn.BatchNorm2d, 8),
            "body": (conv, 8, 8),
            "head": (nn.Linear, 8, 5),
        },
        IMAGE,
        {
            "stem": (
                8,
                f"{STEM} depthwise.weight:0 depthwise.bias:0 norm.weight:0 norm.bias:0 norm.running_mean:0 "
                "norm.running_var:0 body.weight:1",
            ),
            **BODY,
        },
    ),
    "depthwise with a multiplier": (
        lambda net, x: pooled(net, net.depthwise(net.stem(x))),
        {"stem": (conv, 3, 8), "depthwise": (lambda: conv(8, 16, groups=8),), "head": (nn.Linear, 16, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} depthwise.weight:0*2 depthwise.bias:0*2 head.weight:1*2")},
    ),
    "grouped convolution": (
        lambda net, x: pooled(net, net.grouped(net.stem(x))),
        {"stem": (conv, 3, 12), "grouped": (lambda: conv(12, 6, groups=3),), "head": (nn.Linear, 6, 5)},
        IMAGE,
        {"stem": (3, "stem.weight:0*4 stem.bias:0*4 grouped.weight:0*2 grouped.bias:0*2 head.weight:1*2")},
    ),
    "transposed convolution": (
        lambda net, x: pooled(net, net.body(net.stem(x))),
        {"stem": (nn.ConvTranspose2d, 3, 8, 2), "body": (nn.ConvTranspose2d, 8, 8, 2), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, "stem.weight:1 stem.bias:0 body.weight:0"), "body": (8, f"body.weight:1 body.bias:0 {HEAD}")},
    ),
    "concat": (
        lambda net, x: pooled(net, net.body(torch.cat([net.stem(x), net.other(x)], 1))),
        {"stem": (conv, 3, 4), "other": (conv, 3, 6), "body": (conv, 10, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (4, f"{STEM} body.weight:1"), "other": (6, "other.weight:0 other.bias:0 body.weight:1"), **BODY},
    ),
    "concat with itself": (
        lambda net, x: pooled(net, net.body(torch.cat([net.stem(x), -net.stem(x)], 1))),
        {"stem": (conv, 3, 8), "body": (conv, 16, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} body.weight:1*2"), **BODY},
    ),
    "channel shuffle": (
        view_shuffle,
        {"stem": (conv, 3, 8), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (4, "stem.weight:0*2 stem.bias:0*2 body.weight:1*2"), **BODY},
    ),
    "squeeze and excite": (
        gated,
        {"stem": (conv, 3, 8), "reduce": (conv, 8, 4, 1), "expand": (conv, 4, 8, 1), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {
            "stem": (8, f"{STEM} reduce.weight:1 expand.weight:0 expand.bias:0 {HEAD}"),
            "reduce": (4, "reduce.weight:0 reduce.bias:0 expand.weight:1"),
        },
    ),
    "chunk": (
        chunked,
        {"stem": (conv, 3, 8), "body": (conv, 4, 4), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {
            "stem": (4, f"{STEM} body.weight:1"),
            "stem#2": (4, f"{STEM} {HEAD}"),
            "body": (4, f"body.weight:0 body.bias:0 {HEAD}"),
        },
    ),
    "uneven split": (
        split_unevenly,
        {"stem": (conv, 3, 8), "body": (conv, 2, 4), "head": (nn.Linear, 10, 5)},
        IMAGE,
        {
            "stem": (2, f"{STEM} body.weight:1"),
            "stem#2": (6, f"{STEM} {HEAD}"),
            "body": (4, f"body.weight:0 body.bias:0 {HEAD}"),
        },
    ),
    "slice": (
        sliced,
        {"stem": (conv, 3, 8), "first": (conv, 3, 4), "second": (conv, 5, 4), "head": (nn.Linear, 4, 5)},
        IMAGE,
        {
            "stem": (3, f"{STEM} first.weight:1"),
            "stem#2": (5, f"{STEM} second.weight:1"),
            "first": (4, f"first.weight:0 first.bias:0 second.weight:0 second.bias:0 {HEAD}"),
        },
    ),
    "negative slice": (
        lambda net, x: pooled(net, net.body(net.stem(x)[:, -3:])),
        {"stem": (conv, 3, 8), "body": (conv, 3, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (5, STEM), "stem#2": (3, f"{STEM} body.weight:1"), **BODY},
    ),
    "one channel gates, taken by a slice": (
        lambda net, x: (lambda y: pooled(net, net.body(y[:, 1:] * y[:, :1].sigmoid())))(net.stem(x)),
        {"stem": (conv, 3, 9), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        TO_BODY,  # the first channel of the stem stays
    ),
    "one channel is selected": (
        lambda net, x: (lambda y: pooled(net, net.body(torch.cat([y, y[:, 8:9]], 1))))(net.stem(x)),
        {"stem": (conv, 3, 9), "body": (conv, 10, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        TO_BODY,
    ),
    "padded shortcut": (
        padded_shortcut,
        {"stem": (conv, 3, 4), "body": (lambda: conv(4, 8, stride=2),), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {
            "stem": (4, f"{STEM} body.weight:1 body.weight:0 body.bias:0 {HEAD}"),
            "body": (4, f"body.weight:0 body.bias:0 {HEAD}"),
        },
    ),
    "attention by products": (matmul_attention, ATTENTION_PARTS, TOKENS, ATTENTION),
    "attention by scaled_dot_product_attention": (product_attention, ATTENTION_PARTS, TOKENS, ATTENTION),
    "attention by einsum": (
        einsum_attention,
        {**{name: (nn.Linear, 6, 16) for name in "qkv"}, "proj": (nn.Linear, 16, 6), "head": (nn.Linear, 6, 5)},
        TOKENS,
        SEPARATE_ATTENTION,
    ),
    "attention of a torch module": (
        lambda net, x: pooled(net, net.attention(x, x, x, need_weights=False)[0]),
        {"attention": (lambda: nn.MultiheadAttention(6, 3, batch_first=True),), "head": (nn.Linear, 6, 5)},
        TOKENS,
        {
            "attention.in_proj_weight": (
                3,
                "attention.in_proj_weight:0*6 attention.in_proj_bias:0*6 attention.out_proj.weight:1*2",
            ),
            "attention.in_proj_weight.dims": (2, "attention.in_proj_weight:0*6 attention.in_proj_bias:0*6"),
            "attention.in_proj_weight.dims#2": (
                2,
                "attention.in_proj_weight:0*3 attention.in_proj_bias:0*3 attention.out_proj.weight:1*3",
            ),
            "attention.out_proj": (6, f"attention.out_proj.weight:0 attention.out_proj.bias:0 {HEAD}"),
        },
    ),
    "grouped-query attention": (
        grouped_query_attention,
        {
            "q": (nn.Linear, 6, 16),
            "k": (nn.Linear, 6, 8),
            "v": (nn.Linear, 6, 8),
            "proj": (nn.Linear, 16, 6),
            "head": (nn.Linear, 6, 5),
        },
        TOKENS,
        {
            "q": (2, "q.weight:0*8 q.bias:0*8 k.weight:0*4 k.bias:0*4 v.weight:0*4 v.bias:0*4 proj.weight:1*8"),
            "q.dims": (4, "q.weight:0*4 q.bias:0*4 k.weight:0*2 k.bias:0*2"),
            "v.dims": (4, "v.weight:0*2 v.bias:0*2 proj.weight:1*4"),
            **PROJECTION,
        },
    ),
    "attention of one head": (
        lambda net, x: pooled(net, net.proj(one_head(net, x))),
        {**ATTENTION_PARTS, "qkv": (nn.Linear, 6, 12), "proj": (nn.Linear, 4, 6)},
        TOKENS,
        {**ONE_HEAD, **PROJECTION},
    ),
    "attention of one head in a block": (
        lambda net, x: net.head((net.norm(x) + net.proj(one_head(net, x))).mean(1)),
        {
            "qkv": (nn.Linear, 6, 12),
            "proj": (nn.Linear, 4, 6),
            "norm": (nn.LayerNorm, 6),
            "head": (nn.Linear, 6, 5),
        },
        TOKENS,
        {"qkv.dims": ONE_HEAD["qkv.dims"], "qkv.dims#2": ONE_HEAD["qkv.dims#2"]},
    ),
    "attention between dimensions": (
        attention_between_dimensions,
        ATTENTION_PARTS,
        TOKENS,
        {**HEADS, "qkv.dims": VALUES, **PROJECTION},
    ),
    "normalised queries and keys": (
        normalised_attention,
        {**ATTENTION_PARTS, "norm": (nn.LayerNorm, 4)},
        TOKENS,
        {**HEADS, "qkv.dims": VALUES, **PROJECTION},
    ),
    "scaled dimensions": (
        lambda net, x: attention(net, x, lambda q: q * net.scale),
        {**ATTENTION_PARTS, "scale": (parameter, 4)},
        TOKENS,
        {**ATTENTION, "qkv.dims": (4, "qkv.weight:0*8 qkv.bias:0*8")},
    ),
    "rotary positions in pairs": (
        lambda net, x: attention(net, x, lambda q: rotated(net, q, torch.stack([-q[..., 1::2], q[..., ::2]], -1))),
        {**ATTENTION_PARTS, "cos": (parameter, 5, 4), "sin": (parameter, 5, 4)},
        TOKENS,
        {**ATTENTION, "qkv.dims": (2, "qkv.weight:0*16 qkv.bias:0*16")},
    ),
    "rotary positions in halves": (
        lambda net, x: attention(net, x, lambda q: rotated(net, q, torch.cat([-q[..., 2:], q[..., :2]], -1))),
        {**ATTENTION_PARTS, "cos": (parameter, 5, 4), "sin": (parameter, 5, 4)},
        TOKENS,
        {**ATTENTION, "qkv.dims": (2, "qkv.weight:0*16 qkv.bias:0*16")},
    ),
    "relative positions": (
        relative_position_attention,
        {**ATTENTION_PARTS, "table": (parameter, 9, 4)},
        TOKENS,
        ATTENTION,
    ),
    "group normalisation": (
        lambda net, x: pooled(net, net.norm(net.stem(x)).relu()),
        {"stem": (conv, 3, 8), "norm": (nn.GroupNorm, 2, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (2, "stem.weight:0*4 stem.bias:0*4 norm.weight:0*4 norm.bias:0*4 head.weight:1*4")},
    ),
    "positional embedding": (
        lambda net, x: pooled(net, (net.stem(x) + net.positions).relu()),
        {"stem": (nn.Linear, 6, 8), "positions": (parameter, 1, 5, 8), "head": (nn.Linear, 8, 5)},
        TOKENS,
        {"stem": (8, f"{STEM} {HEAD}")},
    ),
    "layer scale": (
        lambda net, x: pooled(net, net.body(net.stem(x) * net.scale)),
        {"stem": (conv, 3, 8), "scale": (parameter, 8, 1, 1), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        TO_BODY,
    ),
    "class token": (
        class_token,
        {
            "embed": (nn.Linear, 6, 8),
            "token": (parameter, 1, 1, 8),
            "positions": (parameter, 1, 6, 8),
            "mlp": (nn.Linear, 8, 7),
            "head": (nn.Linear, 7, 5),
        },
        TOKENS,
        {
            "embed": (8, "embed.weight:0 embed.bias:0 mlp.weight:1"),
            "mlp": (7, f"mlp.weight:0 mlp.bias:0 {HEAD}"),
        },
    ),
    "first block of a transformer": (
        first_block_of_a_transformer,
        {
            "embed": (nn.Linear, 6, 8),
            "token": (parameter, 1, 1, 8),
            "positions": (parameter, 1, 6, 8),
            "norm": (nn.LayerNorm, 8),
            "qkv": (nn.Linear, 8, 48),
            "proj": (nn.Linear, 16, 8),
            "head": (nn.Linear, 8, 5),
        },
        TOKENS,
        {**HEADS, **QUERIES, "qkv.dims#2": VALUES},
    ),
    "one-channel gate": (
        lambda net, x: (lambda y: pooled(net, net.body(y * net.gate(y).sigmoid())))(net.stem(x)),
        {"stem": (conv, 3, 8), "gate": (conv, 8, 1), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} gate.weight:1 body.weight:1"), **BODY},
    ),
    "pixel shuffle": (
        lambda net, x: pooled(net, net.body(F.pixel_shuffle(net.stem(x), 2))),
        {"stem": (conv, 3, 32), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, "stem.weight:0*4 stem.bias:0*4 body.weight:1"), **BODY},
    ),
    "windows cut out": (
        lambda net, x: pooled(net, net.body(net.stem(x).unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)))),
        {"stem": (conv, 3, 8), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} body.weight:1"), **BODY},
    ),
    "pixel unshuffle": (
        lambda net, x: pooled(net, net.body(F.pixel_unshuffle(net.stem(x), 2))),
        {"stem": (conv, 3, 8), "body": (conv, 32, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} body.weight:1*4"), **BODY},
    ),
    "flattened map": (
        lambda net, x: net.head(net.stem(x).flatten(1)),
        {"stem": (conv, 3, 8), "head": (nn.Linear, 512, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} head.weight:1*64")},
    ),
    "maximum over pairs": (
        lambda net, x: pooled(net, net.stem(x).unflatten(1, (4, 2)).amax(2)),
        {"stem": (conv, 3, 8), "head": (nn.Linear, 4, 5)},
        IMAGE,
        {"stem": (4, f"stem.weight:0*2 stem.bias:0*2 {HEAD}")},
    ),
    "repeated channels": (
        lambda net, x: pooled(net, net.body(net.stem(x).repeat(1, 2, 1, 1))),
        {"stem": (conv, 3, 8), "body": (conv, 16, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} body.weight:1*2"), **BODY},
    ),
    "a convolution applied twice": (
        lambda net, x: pooled(net, net.body(net.body(net.stem(x)))),
        {"stem": (conv, 3, 8), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        {"stem": (8, f"{STEM} body.weight:1 body.weight:0 body.bias:0 {HEAD}")},
    ),
    "a parameter in a product": (
        lambda net, x: pooled(net, net.stem(x) @ net.matrix),
        {"stem": (nn.Linear, 6, 8), "matrix": (parameter, 8, 7), "head": (nn.Linear, 7, 5)},
        TOKENS,
        {"stem": (8, f"{STEM} matrix:0"), "matrix": (7, f"matrix:1 {HEAD}")},
    ),
    "token mixing": (
        lambda net, x: pooled(net, (lambda y: y + net.back(net.mix(y.mT).relu()).mT)(net.stem(x))),
        {
            "stem": (nn.Linear, 6, 8),
            "mix": (nn.Linear, 5, 7),
            "back": (nn.Linear, 7, 5),
            "head": (nn.Linear, 8, 5),
        },
        TOKENS,
        {"stem": (8, f"{STEM} {HEAD}")},
    ),
    "in-place operators": (
        lambda net, x: pooled(net, net.body(F.relu(net.stem(x), inplace=True).add_(1).mul_(2))),
        {"stem": (conv, 3, 8), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
        IMAGE,
        TO_BODY,
    ),
}


def make(forward, parts):
    net = Net(forward, **{name: maker(*sizes) for name, (maker, *sizes) in parts.items()})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.weight)
    return net.double().eval()


def by_hand(groups):
    """Groups in the notation of the table."""
    return {
        group.name: (group.size, {f"{name}:{axis}" + (f"*{n}" if n > 1 else "") for name, axis, n in group.members})
        for group in groups.groups
    }


def assert_slim_equals_masked(net, groups, shape, tolerance=1e-12, seeds=range(3)):
    """For several random masks and a batch size that was never seen; and what is removed must matter."""
    assert groups.groups
    effects = []
    for seed in seeds:
        mask = random_mask(groups, (0.5, 0.25, 0.75)[seed % 3], seed)
        x = torch.randn(3, *shape, dtype=torch.float64)
        masked, module = mask.apply(groups)(x), extract(groups, mask)
        assert relative_error(module(x), masked) <= tolerance
        effects.append(relative_error(masked, net(x)))
    assert max(effects) > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_those_found_by_hand_and_removing_them_equals_masking_them(name):
    forward, parts, shape, expected = NETWORKS[name]
    net = make(forward, parts)
    with untouched(net):
        groups = channel_groups(net, torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator()))
    assert by_hand(groups) == {group: (size, set(members.split())) for group, (size, members) in expected.items()}
    assert lost_weights(net, groups) == (["mix.weight", "back.weight"] if name == "token mixing" else [])
    assert_slim_equals_masked(net, groups, shape)


@pytest.mark.parametrize(
    "shuffle",
    [
        lambda net, x: F.channel_shuffle(x, 2),
        lambda net, x: x.unfold(1, 4, 4).permute(0, 1, 4, 2, 3).flatten(1, 2),
        lambda net, x: x[:, ::2] + x[:, 1::2],
        lambda net, x: torch.stack(x.unbind(1)[::-1], 1),
        lambda net, x: x[:, [7, 1, 2, 0, 3, 4, 6, 5]],
        lambda net, x: x.roll(3, 1),
        lambda net, x: F.glu(x, 1),
        lambda net, x: x.cumsum(1),
    ],
    ids=[
        "channel_shuffle",
        "windows of channels",
        "every other channel",
        "reversed",
        "permuted",
        "rolled",
        "glu",
        "cumsum",
    ],
)
def test_movement_along_channels_is_sliced_right_or_its_channels_stay(shuffle):
    """Whatever the groups are: a mask that they allow can be extracted, and equals the slim network."""
    width = shuffle(None, torch.zeros(2, 8, 4, 4)).shape[1]
    net = make(
        lambda net, x: pooled(net, net.body(shuffle(net, net.stem(x)))),
        {"stem": (conv, 3, 8), "body": (conv, width, 8), "head": (nn.Linear, 8, 5)},
    )
    groups = channel_groups(net, torch.randn(2, *IMAGE, dtype=torch.float64))
    assert_slim_equals_masked(net, groups, IMAGE)


# ---------------------------------------------------------------- what is not prunable, and why


def reasons(groups):
    return {item.name: (item.size, item.node, item.reason) for item in groups.unprunable}


def test_channels_that_are_normalised_together_are_listed_with_node_and_reason():
    net = make(
        lambda net, x: pooled(net, net.norm(net.stem(x))),
        {"stem": (nn.Linear, 6, 8), "norm": (nn.LayerNorm, 8), "head": (nn.Linear, 8, 5)},
    )
    groups = channel_groups(net, torch.randn(2, *TOKENS, dtype=torch.float64))
    assert len(groups) == 0
    assert groups.prunable_parameters == 0
    assert reasons(groups) == {
        "stem.weight": (8, "layer_norm", "normalises over the channels, so all of them stay together"),
        "head.weight": (5, "output", "these are the model's outputs"),
    }
    assert "stem.weight (8 channels): normalises over the channels" in str(groups)
    assert "(node 'layer_norm')" in str(groups)


def test_an_operator_without_a_rule_keeps_its_channels_and_is_listed_by_name():
    net = make(
        lambda net, x: pooled(net, net.body(torch.renorm(net.stem(x), 2, 1, 1.0))),
        {"stem": (conv, 3, 8), "body": (conv, 8, 8), "head": (nn.Linear, 8, 5)},
    )
    groups = channel_groups(net, torch.randn(2, *IMAGE, dtype=torch.float64))
    assert by_hand(groups) == {"body": (8, {"body.weight:0", "body.bias:0", HEAD})}
    size, node, reason = reasons(groups)["stem.weight"]
    assert (size, reason) == (8, "operator aten.renorm.default has no rule, so all of them stay")
    assert node in {item.name for item in groups.graph_module.graph.nodes}
    assert_slim_equals_masked(net, groups, IMAGE)


def explained(forward, parts, shape, name, channel):
    """What is said of a channel, and the kind of event at each node of its chain."""
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    found = groups.explain(name, channel)
    assert {event.node for event in found.events} <= {node.name for node in groups.graph_module.graph.nodes}
    assert str(found).splitlines()[1:] == [f"  node '{event.node}': {event.why}" for event in found.events]
    return found.group, str(found).splitlines()[0], [event.why for event in found.events]


def test_a_channel_that_stays_is_explained_by_the_chain_of_events_up_to_the_one_that_keeps_it():
    def forward(net, x):
        x = net.stem(x)
        return pooled(net, net.side(x) + torch.renorm(x + net.body(x), 2, 1, 1.0))

    parts = {"stem": (conv, 3, 8), "body": (conv, 8, 8), "side": (conv, 8, 8), "head": (nn.Linear, 8, 5)}
    assert explained(forward, parts, IMAGE, "body.weight", 2) == (
        None,
        "body.weight[2] always stays: it is tied to channels that always stay",
        ["meet elementwise", "operator aten.renorm.default has no rule"],
    )
    assert explained(forward, parts, IMAGE, "stem.weight", 2) == (
        None,
        "stem.weight[2] always stays: an operator keeps it",
        ["operator aten.renorm.default has no rule"],
    )


def test_channels_that_are_removable_tied_or_outputs_are_explained():
    forward, parts, shape, _ = NETWORKS["residual"]
    assert explained(forward, parts, shape, "body.weight", 3)[0] == "stem"
    assert explained(forward, parts, shape, "body.weight", 3)[2] == ["meet elementwise"]
    assert explained(forward, parts, shape, "head.weight", 4) == (
        None,
        "head.weight[4] always stays: it is one of the model's outputs",
        [],
    )
    parts = {"stem": (nn.Linear, 6, 8), "norm": (nn.LayerNorm, 8), "head": (nn.Linear, 8, 5)}
    assert explained(lambda net, x: pooled(net, net.norm(net.stem(x))), parts, TOKENS, "stem.weight", 0) == (
        None,
        "stem.weight[0] always stays: nothing would be left without it, since it forms one unit with others",
        ["normalises over the channels"],
    )


@pytest.mark.parametrize(
    ("name", "channel", "message"),
    [
        ("stem.wieght", 0, "name: 'stem.wieght' is not a parameter.*did you mean 'stem.weight'"),
        (3, 0, "name: 3 is not a parameter"),
        ("stem.weight", 8, "channel: got 8, expected an index of 'stem.weight' from 0 to 7"),
        ("stem.weight", -1, "channel: got -1"),
        ("stem.weight", True, "channel: got True"),
        ("stem.weight", 0.5, "channel: got 0.5"),
    ],
)
def test_a_channel_that_there_is_not_is_not_explained(name, channel, message):
    forward, parts, shape, _ = NETWORKS["residual"]
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=message):
        groups.explain(name, channel)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_channel_is_explained_as_it_is_grouped(name):
    forward, parts, shape, _ = NETWORKS[name]
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    stays = {item.name: item for item in groups.unprunable}
    for (parameter, axis), labels in groups.labelling.slots.items():
        for channel in range(len(labels) if axis == 0 else 0):
            found = groups.explain(parameter, channel)
            assert (found.group is None) or parameter in {member for member, _, _ in groups[found.group].members}
            if found.group is None and groups.labelling.roles[parameter, 0] == "out":
                assert parameter in stays
            if found.because.startswith(("it is tied", "an operator")):
                assert found.events
            if "input" in found.because:
                assert not found.events and int(labels[channel]) == 0


def test_a_single_gating_channel_is_listed():
    forward, parts, shape, _ = NETWORKS["one-channel gate"]
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    assert reasons(groups)["gate.weight"][0] == 1


def test_only_the_outputs_of_a_residual_network_stay():
    forward, parts, shape, _ = NETWORKS["residual"]
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    assert reasons(groups) == {"head.weight": (5, "output", "these are the model's outputs")}


# ---------------------------------------------------------------- looking things up, and bad input


def test_groups_are_found_by_name_and_by_parameter():
    forward, parts, shape, _ = NETWORKS["squeeze and excite"]
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    assert groups["stem"] == groups["stem.weight"] == groups["expand.weight"]
    assert groups["reduce"].size == 4
    assert groups.outputs == 5
    with pytest.raises(KeyError):
        groups["nothing"]
    assert channel_groups(groups) is groups


def test_a_log_lists_the_groups(caplog):
    forward, parts, shape, _ = NETWORKS["residual"]
    caplog.set_level(logging.DEBUG, "netclone")
    groups = channel_groups(make(forward, parts), torch.randn(2, *shape, dtype=torch.float64))
    assert [r.getMessage() for r in caplog.records if r.name == "netclone.channels"] == [f"Net: {groups}"]


def test_counts_of_parameters_are_exact():
    forward, parts, shape, _ = NETWORKS["squeeze and excite"]
    net = make(forward, parts)
    groups = channel_groups(net, torch.randn(2, *shape, dtype=torch.float64))
    assert groups.parameters == sum(p.numel() for p in net.parameters())
    assert groups.prunable_parameters == groups.parameters - 5  # all but the bias of the head


def test_the_same_network_gives_the_same_groups_and_fingerprint():
    forward, parts, shape, _ = NETWORKS["chunk"]
    first, second = (channel_groups(make(forward, parts), torch.randn(2, *shape).double()) for _ in range(2))
    assert first == second  # other weights, same structure
    other = make(forward, {**parts, "body": (conv, 4, 5), "head": (nn.Linear, 9, 5)})
    assert channel_groups(other, torch.randn(2, *shape).double()).fingerprint != first.fingerprint


def test_an_output_that_is_not_logits_is_refused():
    groups = channel_groups(Net(lambda net, x: net.stem(x), stem=conv(3, 8)), torch.randn(2, *IMAGE))
    with pytest.raises(OutputError, match=r"\(N, \(8, 8, 8\)\).*expected logits"):
        groups.outputs  # noqa: B018


def test_a_model_in_two_dtypes_is_refused():
    net = Net(lambda net, x: net.head(net.stem(x).double()), stem=nn.Linear(6, 8), head=nn.Linear(8, 5).double())
    with (
        untouched(net),
        pytest.raises(ArgumentError, match=r"'head.weight' is torch.float64.*'stem.weight' is") as info,
    ):
        channel_groups(net, torch.randn(2, 6, generator=torch.Generator()))
    assert ".to()" in str(info.value)
