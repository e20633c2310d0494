"""hold(value, images): a target's value for others to read, through which no gradient reaches its parameters.

A target in a grafted graph keeps the ``requires_grad`` of its parameters, since torch chooses kernels by it, and frozen
parameters would give other bits. Instead, the values that others read are held, so no parameter gets a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import handle_torch_function, has_torch_function

_Edges = tuple[GradientEdge | None, ...]


def hold(value: Tensor, images: Tensor, copy: bool = False) -> Tensor:
    """The same values, cut off from the parameters that computed them; gradients reach the images alone.

    If the images require no gradient, this is :meth:`torch.Tensor.detach`. ``copy`` returns new memory, which is needed
    if a later operation writes into ``value``. Functional transforms (``torch.func``) and forward-mode differentiation
    never write into ``.grad``; if they follow the images, the value passes unchanged.

    Examples
    --------
    >>> weight, images = torch.ones(1, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    >>> hold(3 * weight * images, images).sum().backward()
    >>> weight.grad is None, images.grad.tolist()
    (True, [[3.0], [3.0]])
    """
    if has_torch_function((value, images)):  # one node if the graph is traced again
        held: Tensor = handle_torch_function(hold, (value, images), value, images, copy)
        return held
    if copy:
        value = value.clone()
    if value is images or torch.autograd.forward_ad._current_level >= 0:
        return value
    if not (torch.is_grad_enabled() and images.requires_grad and value.requires_grad):
        return value.detach()
    if torch._C._are_functorch_transforms_active():
        return value
    return _through(value, (get_gradient_edge(images),), (images,))


def _through(value: Tensor, edges: _Edges, inputs: tuple[Tensor, ...]) -> Tensor:
    """A value as a function of ``inputs`` alone; ``edges`` are where they, or stand-ins, enter its history."""
    result: Tensor = _Through.apply((value, edges), *inputs)
    return result


class _Through(torch.autograd.Function):
    """Takes its arguments in a tuple, which autograd does not look into, so that the value's history is cut off."""

    @staticmethod
    def forward(ctx: Any, computed: tuple[Tensor, _Edges], *inputs: Tensor) -> Tensor:
        value, ctx.edges = computed
        ctx.value = get_gradient_edge(value)  # an edge stays valid if someone writes into the tensor
        ctx.save_for_backward(*inputs)
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        twice = torch.is_grad_enabled()
        given = gradient.detach().requires_grad_(twice and gradient.requires_grad)
        found = torch.autograd.grad(
            ctx.value,
            [edge for edge in ctx.edges if edge is not None],
            given,
            retain_graph=True,
            create_graph=twice,
            allow_unused=True,
        )
        each = iter(found)
        parts = [None if edge is None else next(each) for edge in ctx.edges]
        if twice:  # a gradient depends on parameters too, so it is held like the value
            edges = (*ctx.edges, get_gradient_edge(given) if given.requires_grad else None)
            inputs = (*ctx.saved_tensors, gradient)
            parts = [
                part if part is None or not part.requires_grad else _through(part, edges, inputs) for part in parts
            ]
        return None, *parts
