"""compose(modules) -> GraftedModule: a classifier from clones of several sources, without any target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netclone.cloning.grafted import GraftedModule
from netclone.cloning.injecting import inject
from netclone.cloning.modules import CloneModule
from netclone.cloning.requirements import check_clone
from netclone.errors import AdapterError, ArgumentError
from netclone.graph.tracing import INPUT
from netclone.runtime.entering import entered


class _Composed(nn.Module):
    """The target of no classes that composed clones are grafted onto."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 0
        self.pretrained_cfg = {"num_classes": 0, "label_names": list[str]()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 0)``."""
        return images.new_empty((images.shape[0], 0))


@entered()
def compose(
    modules: Sequence[CloneModule] | Mapping[str, CloneModule], *, allow_same_names: bool = False
) -> GraftedModule:
    """Put clones side by side as one classifier, without a target: their logits in order, ``(N, K1 + K2 + ...)``.

    Each clone sees the images, prepared in the same way for all. What comes back is a grafted model whose target has no
    classes, so :func:`remove`, :func:`disabled`, :func:`replace` and :func:`evaluate` work as on any other. The logits
    of different sources have no common scale; :func:`trade_off` and ``module.with_bias(...)`` balance them.

    Parameters
    ----------
    modules
        Clones from :func:`extract` that were cut at their source's input, in order, or by name. They are copied.
    allow_same_names
        Whether two columns may have one class name, as for :func:`inject`.

    Raises
    ------
    ArgumentError
        If there are none, one is not a clone, a class name is there twice, or devices or dtypes differ.
    AdapterError
        If a clone was cut behind its source's input, was fitted to a target, or takes images of another shape.
    CloneNameError
        If a name is not an identifier.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> parts = {}
    >>> for name, architecture in (("birds", "test_resnet"), ("cats", "test_efficientnet")):
    ...     source = timm.create_model(architecture, num_classes=4)
    ...     parts[name] = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[1, 3])
    >>> both = netclone.compose(parts)
    >>> both(torch.zeros(2, 3, 160, 160)).shape, both.columns
    (torch.Size([2, 4]), {'birds': range(0, 2), 'cats': range(2, 4)})
    """
    named = list(modules.items()) if isinstance(modules, Mapping) else [(None, module) for module in modules]
    if not named:
        raise ArgumentError("modules: none were given; pass clones from netclone.extract(source, mask, classes=...)")
    for place, (name, module) in enumerate(named):
        check_clone(module)
        _check_reads_images(module, f"modules: '{name}'" if name else f"modules: number {place}", named[0][1])
    first = named[0][1]
    like = next((tensor for tensor in first.parameters() if tensor.is_floating_point()), torch.zeros(()))
    images = torch.zeros(2, *first.spec.input_shape, dtype=like.dtype, device=like.device)
    made: nn.Module = _Composed().eval()
    for name, module in named:
        _check_same_kind(like, module)
        made = inject(made, module, INPUT, name=name, example_inputs=images, allow_same_names=allow_same_names)
    assert isinstance(made, GraftedModule)
    return made


def _check_reads_images(module: CloneModule, which: str, first: CloneModule) -> None:
    spec = module.spec
    way_out = "make one with netclone.extract(source, mask, classes=...), without a position"
    if spec.feature_shape is not None:
        raise AdapterError(
            f"{which} was fitted to a target and reads '{spec.feature_node}' of it, and here is no target: {way_out}"
        )
    if spec.source_at not in (None, INPUT):
        raise AdapterError(f"{which} takes its source's features at '{spec.source_at}', not images: {way_out}")
    if spec.input_shape != first.spec.input_shape:
        raise AdapterError(
            f"{which} takes images {spec.input_shape}, the first one {first.spec.input_shape}, and all get the same: "
            "extract both with example_inputs of one size"
        )


def _check_same_kind(like: Tensor, module: CloneModule) -> None:
    for tensor in module.parameters():
        if tensor.is_floating_point() and (tensor.dtype, tensor.device) != (like.dtype, like.device):
            raise ArgumentError(
                f"modules: tensors are {tensor.dtype} on {tensor.device} and {like.dtype} on {like.device}: bring all "
                f"to one with module.to('{like.device}', {like.dtype})"
            )
