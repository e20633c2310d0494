"""save_grafted(grafted, path): a grafted network in one file, which netclone.load_model reads."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from netclone.cloning.grafted import clones, own_columns, read_by, seat_of
from netclone.cloning.injecting import remove
from netclone.cloning.modules import CloneModule, to_bytes
from netclone.cloning.verifying import compare
from netclone.errors import ArgumentError, LoadError, PositionError
from netclone.files.bundling import Bundle, Packed, config_of, write_bundle
from netclone.files.options import checked_options
from netclone.files.provenance import History, checked_by
from netclone.graph.capturing import FACTS
from netclone.graph.describing import described, facts_about
from netclone.graph.modes import QUICK
from netclone.graph.tracing import position, same_bits
from netclone.models.loading import HISTORY, told_size
from netclone.models.loading import grafted as built


def save_grafted(
    grafted: fx.GraphModule,
    path: str | os.PathLike[str],
    *,
    target: nn.Module | None = None,
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    by: str | None = None,
) -> None:
    """Write a grafted network to one file, as ``netclone inject`` does; :func:`netclone.load_model` reads it.

    The file holds the name of the target's architecture, its constructor's options, its tensors, and its clones as
    :func:`netclone.save` writes them. It is written only if reading it gives the same logits to the bit. It also holds
    a log, which ``netclone log`` lists: of what was injected and removed on which day, and when the network was read
    from such a file, of what that one says. A clone whose tensors have changed since was removed and injected.

    Parameters
    ----------
    grafted
        What :func:`netclone.inject` returned.
    path
        Where to write.
    target
        The target itself, if it has tensors that the graph does not read and the file should hold too.
    architecture
        ``"timm/..."``, ``"torchvision/..."`` or ``"transformers/..."`` (a ``model_type``). May be left out for networks
        of timm and transformers, which record it.
    options
        Arguments of its constructor, such as ``{"pad_type": "same"}``: text, numbers, true, false and lists. May be
        left out for networks of timm and transformers, which record them.
    by
        Who does it, for the log. None: the log does not say.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones, ``target`` is not its target, the architecture is not known, or ``by`` is no
        name in one line.
    ArchiveError
        If a clone or an option may not be stored in a file, or the file cannot be written.
    LoadError
        If the architecture with these options is another network.

    Examples
    --------
    >>> import netclone, tempfile, timm
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude")
    >>> module = netclone.extract(source, mask, classes=[5, 7])
    >>> target = timm.create_model("test_efficientnet", num_classes=4, pad_type="same").eval()
    >>> grafted = netclone.inject(target, module, at="input", name="shirts")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     netclone.save_grafted(grafted, f"{folder}/grafted.safetensors")
    ...     netclone.clones(netclone.load_model(f"{folder}/grafted.safetensors"))
    ('shirts',)
    """
    if not isinstance(grafted, fx.GraphModule) or not clones(grafted):
        raise ArgumentError("grafted: it holds no clones; pass the graph that netclone.inject(...) returned")
    if not own_columns(grafted):
        raise ArgumentError(
            "grafted: it was composed and has no target; write each clone with netclone.save, and compose them again"
        )
    names, own, who = clones(grafted), grafted, checked_by(by)
    packed = []
    for name in names:
        module = cast(CloneModule, grafted.get_submodule(name))
        archive = to_bytes(module, f"clone '{name}'")
        seat = seat_of(grafted, name)
        packed.append(Packed(name, _position_of(grafted, name, module), archive, seat.first, seat.off))
        own = remove(own, name)
    network = own if target is None else target
    about = facts_about(network)
    known = about.get("architecture")
    if architecture is None and not isinstance(known, str):
        raise ArgumentError("architecture: the target does not record it; pass it, such as 'torchvision/resnet50'")
    made = described(network).get("_model_args", {}) if options is None else options
    assert isinstance(made, Mapping)
    bundle = Bundle(
        architecture=architecture or f"{about.get('library', 'timm')}/{known}",
        tensors=_tensors(own, target),
        clones=tuple(packed),
        config=config_of(network) | told_size(network, made),
        options=checked_options({name: value for name, value in made.items() if name != "num_classes"}),
    ).logged(grafted.meta.get(HISTORY, History()), by=who)
    check_comes_back(bundle, grafted, Path(path))
    write_bundle(bundle, path)


def check_comes_back(bundle: Bundle, grafted: fx.GraphModule, path: Path) -> None:
    """Raise unless reading the bundle back gives the same network, to the bit.

    Raises
    ------
    LoadError
        If it gives another one.
    """
    here = copy.deepcopy(grafted).to("cpu").eval()
    example = here.meta[FACTS]["example"]
    images = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)
    found = compare(built(bundle, path).network, here, images, QUICK)
    if found.different:
        raise LoadError(
            f"target: it is not what {bundle.architecture} with the options {dict(bundle.options)} computes "
            f"({found.different[0].mode}: {found.different[0].seen}), and a file holds only these and the tensors"
        )


def _tensors(own: fx.GraphModule, target: nn.Module | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint: the graph's, or those of the target that it was made from."""
    derived = own.meta[FACTS].get("derived", ())
    read = {name: tensor for name, tensor in own.state_dict().items() if name not in derived}
    if target is None:
        return read
    given = target.state_dict()
    others = [name for name, tensor in read.items() if name not in given or not same_bits(tensor, given[name])]
    if others:
        raise ArgumentError(f"target: its tensor '{others[0]}' differs from that of the grafted network's target")
    return given


def _position_of(grafted: fx.GraphModule, name: str, module: CloneModule) -> str | None:
    """Where a clone reads the target, by a name that a new trace has too; None: where it was fitted for."""
    node = read_by(grafted, name)[0].name
    paths = [path for path, found in grafted.meta[FACTS]["positions"].items() if found == node]
    for at in (module.at, "input", *paths):
        try:
            if at is not None and position(grafted, at).name == node:
                return None if at == module.at else at
        except PositionError:
            continue
    return node
