"""A grafted network by name in timm: ``timm.create_model("netclone", file="grafted.safetensors")``.

Importing this module registers the name. timm's scripts import nothing of others, so they are run through it:
``python -m netclone.timm validate.py --model netclone --model-kwargs file=grafted.safetensors ...``
"""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import register_model
from torch import nn

from netclone.cloning.grafted import GraftedModule, own_nodes
from netclone.cloning.target_features import find_head
from netclone.errors import ArgumentError, NetcloneWarning
from netclone.graph.describing import facts_about
from netclone.graph.preparing import ORDER, prepared_as
from netclone.models.loading import load_model, open_target
from netclone.runtime.entering import entered

_OF_TIMM = {"pretrained_cfg", "cache_dir"}  # which create_model passes in any case
_USAGE = "usage: python -m netclone.timm SCRIPT.py [ARGUMENTS of the script]"


@register_model
@entered()
def netclone(
    pretrained: bool = False,
    *,
    file: str | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **others: Any,
) -> nn.Module:
    """The network of a file that ``netclone inject`` or :func:`netclone.save_grafted` wrote, for ``timm.create_model``.

    It is what :func:`netclone.load_model` gives, with ``num_classes``, and with ``pretrained_cfg``: the preprocessing
    that the clones were made for, and ``label_names``. If the target is one of timm's, it has these methods too:

    - ``forward_features(images)``: the target's features, to the bit.
    - ``forward_head(features, pre_logits=True)``: what the target's classifier reads. Without ``pre_logits`` it is
      refused, since clones read more than these features.
    - ``get_classifier()``: a tuple, because no single layer gives all columns: the target's classifier, then each
      clone.

    Parameters
    ----------
    pretrained
        Makes no difference: the weights are those of the file.
    file
        The file's name. timm's scripts take it as ``--model-kwargs file=grafted.safetensors``.
    num_classes, in_chans
        What the caller expects; anything else than what the file has is an error.
    pretrained_cfg_overlay
        Preprocessing by timm's names, instead of the file's.

    Raises
    ------
    ArgumentError
        If no file is named, the file has other numbers, or there is an option: a file has those of its network.
    LoadError, ArchiveError
        As :func:`netclone.load_model`.

    Examples
    --------
    >>> import netclone.timm, tempfile, timm
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude")
    >>> module = netclone.extract(source, mask, classes=[5, 7], class_names=["shirt", "coat"])
    >>> target = timm.create_model("test_efficientnet", num_classes=4)
    >>> grafted = netclone.inject(target, module, at="input", name="shirts")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     netclone.save_grafted(grafted, f"{folder}/grafted.safetensors")
    ...     model = timm.create_model("netclone", file=f"{folder}/grafted.safetensors")
    >>> model.num_classes, model.label_names
    (6, (None, None, None, None, 'shirt', 'coat'))

    Reference: timm ``register_model``.
    """
    if file is None:
        raise ArgumentError(
            "file: got none; name the grafted file: timm.create_model('netclone', file='grafted.safetensors'), or "
            "--model netclone --model-kwargs file=grafted.safetensors. A --checkpoint has tensors alone and is read "
            "later"
        )
    if unknown := sorted(others.keys() - _OF_TIMM):
        raise ArgumentError(
            f"{unknown[0]}: a grafted file has the options of its network; leave out {', '.join(unknown)}"
        )
    model = load_model(file)
    has = {"num_classes": getattr(model, "num_classes", None), "in_chans": facts_about(model)["input_size"][0]}
    for name, asked in (("num_classes", num_classes), ("in_chans", in_chans)):
        if asked is not None and asked != has[name]:
            raise ArgumentError(f"{name}: got {asked}, and '{file}' has {has[name]}; leave it out")
    if facts_about(model).get(*ORDER) != ORDER[1]:
        warnings.warn(
            f"file: '{file}' takes images whose channels are in the order of BGR, and timm's transforms give RGB: flip "
            "them, or use netclone evaluate and netclone predict",
            NetcloneWarning,
            stacklevel=2,
        )
    if isinstance(model, GraftedModule):
        find_head(model, own_nodes(model), open_target(file).network)
    prepared_as(model, pretrained_cfg_overlay or {})
    return model


def main(arguments: Sequence[str]) -> None:
    """Run a script of timm as Python would, where the name ``netclone`` is one of timm's models."""
    if not arguments or not Path(arguments[0]).is_file():
        sys.exit(f"netclone.timm: no script {arguments[0]!r}\n{_USAGE}" if arguments else _USAGE)
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
