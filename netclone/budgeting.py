"""Budgets: the share of channels that leaves a share of a network's parameters or MACs."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from netclone.channels import ChannelGroup, ChannelGroups
from netclone.errors import ArgumentError
from netclone.slimming import slim

BUDGETS = ("channels", "params", "macs")


def channel_share(groups: ChannelGroups, keep: float, budget: str) -> float:
    """The largest share of every group's units, in (0, 1], with which ``keep`` of the budget is not exceeded.

    Raises
    ------
    ArgumentError
        If one unit in every group is too much already, or ``budget`` is unknown.

    Examples
    --------
    >>> import timm, netclone
    >>> groups = netclone.channel_groups(timm.create_model("test_resnet", num_classes=4))
    >>> 0.5 < channel_share(groups, 0.5, "params") < 0.8
    True
    """
    if budget not in BUDGETS:
        raise ArgumentError(f"budget: got {budget!r}, expected one of {', '.join(map(repr, BUDGETS))}")
    if budget == "channels" or keep == 1:
        return keep
    whole = _size(groups, 1.0, budget)
    low, high = 0.0, 1.0
    if (least := _size(groups, low, budget) / whole) > keep:
        raise ArgumentError(
            f"keep: {keep} of the {budget} cannot be reached by removing channels: one unit in every group leaves "
            f"{least:.2g}; ask for that or more, or see channel_groups(source).unprunable for what stays"
        )
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if _size(groups, middle, budget) <= keep * whole else (low, middle)
    return max(low, 1e-6)


def units_kept(group: ChannelGroup, share: float) -> int:
    """How many units of a group a share is: at least one."""
    return max(1, round(share * group.size))


def _size(groups: ChannelGroups, share: float, budget: str) -> int:
    """Parameters, or MACs for one image, with a share of every group's units (those of one group weigh the same)."""
    removed = [unit for group in groups.groups for unit in group.units[units_kept(group, share) :]]
    slimmed = slim(groups.labelling, torch.tensor(sorted(removed), dtype=torch.long))
    if budget == "params":
        return sum(parameter.numel() for parameter in slimmed.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        slimmed(groups.example[:1])
    return int(counter.get_total_flops()) // 2
