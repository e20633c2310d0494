"""extract(source, mask) -> CloneModule: the masked source as a physically slim network, cut at a position."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from netclone.channels.certifying import certify
from netclone.channels.grouping import ChannelGroups, channel_groups, columns_without, unused_outputs
from netclone.channels.masks import ChannelMask
from netclone.channels.slimming import Resizer, slim
from netclone.cloning.modules import CloneModule
from netclone.files.spec import CloneSpec
from netclone.graph.cutting import cut, end_before_classifier, features_node, order_outputs
from netclone.graph.folding import fold_batch_norms
from netclone.graph.functionalizing import in_place_again
from netclone.graph.outputs import Output
from netclone.graph.tracing import position, shape_of
from netclone.learning.data import Batches, Classes, Samples, check_classes, check_names, gather, names_for
from netclone.learning.reconstructing import reconstruct_slim
from netclone.runtime.entering import entered
from netclone.runtime.sharing import ALONE, Workers


@entered()
def extract(  # noqa: PLR0913 - public
    source: nn.Module | ChannelGroups,
    mask: ChannelMask,
    at: str | None = None,
    *,
    classes: Classes | None = None,
    class_names: str | Sequence[str] = (),
    reconstruct: Batches | None = None,
    fold_batch_norm: bool = False,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    output: Output = None,
) -> CloneModule:
    """Cut the masked source at a position and store only what is kept.

    Parameters
    ----------
    source
        The network: a module, a traced graph, or the groups found in one, which saves finding them again. Untouched.
    mask
        The channels to keep, from a mask made for this source.
    at
        Where to cut: the module's input is the source's (slim) features there. None: the source's input.
    classes
        Columns of the output to keep, in this order, or names of the source's classes; None keeps every class.
    class_names
        One name per class, stored with the module. Left out, classes that are given by name keep that name.
    fold_batch_norm
        Whether to fold BatchNorm into the convolutions before it. This is about a tenth faster and equal up to one
        rounding of the weights; the certificate is computed before.
    reconstruct
        Images and labels in any form that :func:`netclone.clone` takes. On them, layers that read removed channels are
        refitted by least squares, one after another, to the outputs of the full source. None: the paper's plain copy.
    output
        Which part of what the source returns is its logits, as for :func:`netclone.trace`.

    Raises
    ------
    MaskError
        If the mask was made for another model.
    DataError
        If the samples to refit on are empty or not finite, do not fit the source's input, or have labels outside its
        classes.
    PositionError
        If ``at`` is unknown, its output is not one tensor, or some path of the network goes round it.
    CertificateError
        If the slim network does not equal the masked one in float64 (never expected).

    Examples
    --------
    >>> import timm, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> mask = netclone.localize(source, method="magnitude", keep=0.5)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[1, 3])
    >>> module.classes, module.source_at, module.certificate < 1e-9
    ((1, 3), 'layer2', True)

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.3.
    """
    groups = channel_groups(source, example_inputs, output=output)
    samples = None if reconstruct is None else gather(reconstruct, "reconstruct", names=groups.names)
    if samples is not None:
        samples.check_images(groups.example, "source")
        samples.check_labels(groups.outputs, "source")
    class_names = names_for(classes, class_names)
    slimmed = slim_down(groups, mask, classes)
    if samples is not None:
        slimmed = refit(slimmed, samples, at)
    return module_of(replace(slimmed, fold=fold_batch_norm), at, class_names=class_names, last=True)


def slim_down(groups: ChannelGroups, mask: ChannelMask, classes: Classes | None) -> Slimmed:
    """The whole source without the masked channels; modules are cut from it, after a refit if wanted."""
    chosen = check_classes(classes, groups.outputs, groups.names)
    removed = torch.cat([mask.removed_units(groups), unused_outputs(groups, chosen)]).sort().values
    graph_module = slim(groups.labelling, removed)
    return Slimmed(groups, mask, chosen, removed, graph_module, graph_module.state_dict())


@dataclass(frozen=True)
class Slimmed:
    """A masked source whose removed channels are gone, and which is not cut yet.

    ``graph_module`` is the slim network from images to the logits of the source's ``columns``, ascending, which include
    ``classes``. ``plain`` are its tensors before any refit; the certificate is about these. ``fold``: whether
    modules cut from it get their BatchNorms folded.
    """

    groups: ChannelGroups
    mask: ChannelMask
    classes: tuple[int, ...]
    removed: Tensor
    graph_module: fx.GraphModule
    plain: Mapping[str, Tensor]
    fold: bool = False

    @property
    def columns(self) -> tuple[int, ...]:
        """The source's columns that the slim network gives."""
        return columns_without(self.groups, self.removed)


def certify_slim(slimmed: Slimmed, at: str | None) -> float:
    """max |masked - slim| / max |masked| in float64, for the plain copy behind a cut.

    Raises
    ------
    CertificateError
        If they are not equal.
    """
    return certify(slimmed.groups, slimmed.removed, slimmed.graph_module, slimmed.plain, _node_at(slimmed, at))


def refit(slimmed: Slimmed, samples: Samples, at: str | None, workers: Workers = ALONE) -> Slimmed:
    """The same with the layers behind a cut that read removed channels refitted by least squares."""
    new = Resizer(slimmed.groups.labelling, slimmed.removed)
    refitted = copy.deepcopy(slimmed.graph_module)
    full = slimmed.groups.graph_module
    reconstruct_slim(full, refitted, new, samples, _node_at(slimmed, at), workers=workers)
    return replace(slimmed, graph_module=refitted)


def module_of(
    slimmed: Slimmed,
    at: str | None,
    *,
    class_names: Sequence[str] = (),
    features_only: bool = False,
    last: bool = False,
) -> CloneModule:
    """The part behind a cut as a clone of its own.

    With ``features_only`` it ends before the source's linear classifier, if there is one, and gives ``(N, F)``. The
    ``last`` one takes the slim network itself, which saves a copy.
    """
    check_names(class_names, slimmed.classes)
    certificate = certify_slim(slimmed, at)
    whole = slimmed.graph_module if last else copy.deepcopy(slimmed.graph_module)
    if features_only and features_node(whole) is not None:
        end_before_classifier(whole)
    else:
        columns = slimmed.columns
        order_outputs(whole, [columns.index(c) for c in slimmed.classes], len(columns))
    node = _node_at(slimmed, at)
    body = whole if node is None else cut(whole, node)
    if slimmed.fold:
        fold_batch_norms(body)
    placeholder = next(node for node in body.graph.nodes if node.op == "placeholder")
    input_shape = shape_of(placeholder)
    assert input_shape is not None
    in_place_again(body)
    for left in body.graph.nodes:  # an archive holds no shapes; nor does a fresh module
        left.meta = {"val": left.meta["val"]} if "val" in left.meta else {}
    spec = CloneSpec(
        classes=slimmed.classes,
        class_names=tuple(class_names),
        source_at=at,
        input_shape=input_shape,
        certificate=certificate,
        source_fingerprint=slimmed.groups.fingerprint,
        kept=slimmed.mask.summary(),
    )
    return CloneModule(body, spec).eval()


def _node_at(slimmed: Slimmed, at: str | None) -> str | None:
    """The name of the source's node at a position."""
    return None if at is None else position(slimmed.groups.graph_module, at).name
