"""GraftedModule: a target's graph with clones, the record of them in it, and the questions asked of the two."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, final

from torch import fx, nn

from netclone.cloning.modules import CloneModule, Slot
from netclone.cloning.target_features import forward_features, forward_head, get_classifier
from netclone.errors import ArgumentError, CloneNameError
from netclone.graph.class_names import ClassNames
from netclone.graph.describing import column_names, columns_by_name, plain
from netclone.graph.tracing import logits_node, shape_of

RECORD = "netclone_clones"  # key in GraphModule.meta of a grafted graph
BRANCH = "netclone_branch"  # key in Node.meta of every node that is not the target's own

Columns = Literal["packed", "stable"]
"""Whether the columns of a clone move up when one before it is gone."""


@dataclass(frozen=True)
class Seat:
    """Where the columns of a clone are: whether those of its graph are stable, the first, and whether it is off."""

    columns: Columns | None = None
    first: int | None = None
    off: bool = False


@dataclass(frozen=True)
class Branch:
    """One clone in a graph: its name and the names of the target's nodes that it reads, in order.

    ``first`` is its first column where columns are stable. None: it follows those before it.
    """

    name: str
    reads: tuple[str, ...]
    first: int | None = None


@dataclass(frozen=True)
class Record:
    """The clones in a graph, and the target's former state: modules in train mode, trainable parameters, attributes."""

    branches: tuple[Branch, ...]
    training: tuple[str, ...]
    trainable: tuple[str, ...]
    attributes: dict[str, object]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.branches)

    @property
    def stable(self) -> bool:
        """Whether every clone has columns of its own, which do not move."""
        return any(branch.first is not None for branch in self.branches)


@final
class GraftedModule(fx.GraphModule):
    """A target's graph with clones. Only the clones follow ``train()``: the target's modules stay in eval mode.

    ``clones`` maps the name of each clone to its :class:`CloneModule`, in order of injection. ``columns`` maps it to
    the clone's columns in the logits ``(N, C + K)``, which follow the target's own; a clone that is off may have none.
    ``label_names`` has one name per column, or None where it is not known: the first of several names of a class.
    ``own`` holds the target's own nodes. A module of the target that has one of these names is found under it instead;
    :func:`netclone.clones` gives the names in any case.

    Examples
    --------
    >>> import netclone, timm
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7], class_names=["shirt", "coat"])
    >>> grafted = netclone.inject(timm.create_model("test_resnet", num_classes=2), module, name="shirts", at="layer2")
    >>> grafted.columns, grafted.clones["shirts"].classes, grafted.label_names
    ({'shirts': range(2, 4)}, (5, 7), (None, None, 'shirt', 'coat'))
    """

    if TYPE_CHECKING:
        clones: Mapping[str, CloneModule]
        columns: Mapping[str, range]
        label_names: tuple[str | None, ...]
        own: tuple[fx.Node, ...]

    def __getattr__(self, name: str) -> Any:
        """What a module holds under a name, and then the views of the clones: the target's names come first."""
        view = VIEWS.get(name)
        held = any(name in self.__dict__.get(kind, ()) for kind in ("_parameters", "_buffers", "_modules"))
        if view is None or held or RECORD not in self.__dict__.get("meta", ()):
            return super().__getattr__(name)
        return view(self)

    def train(self, mode: bool = True) -> GraftedModule:
        """Switch the clones (and this module's own flag) to train or eval mode; the target's modules stay in eval."""
        super().train(False)
        for clone in modules_of(self).values():
            clone.train(mode)
        self.training = mode
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The target's parameters: they get no gradient, so DistributedDataParallel (whose name this is) skips them."""
        names = self.meta[RECORD].names
        return [path for path, _ in self.named_parameters() if path.partition(".")[0] not in names]


def clones(grafted: nn.Module) -> tuple[str, ...]:
    """Names of the clones in a grafted graph, in order of injection; none in any other network.

    Examples
    --------
    >>> import netclone, timm, torch
    >>> source = timm.create_model("test_resnet", num_classes=8)
    >>> mask = netclone.localize(source, method="magnitude", keep=1.0)
    >>> module = netclone.extract(source, mask, at="layer2", classes=[5, 7])
    >>> target = timm.create_model("test_resnet", num_classes=4).eval()
    >>> grafted = netclone.inject(target, module, at="layer2", name="shirts")
    >>> netclone.clones(netclone.inject(grafted, module, at="layer2"))
    ('shirts', 'clone')

    Reference: docs/adr/0004-grafting.md.
    """
    model = getattr(grafted, "_orig_mod", grafted)  # of a compiled one, what was compiled
    return record_of(model).names if isinstance(model, GraftedModule) else ()


def modules_of(grafted: fx.GraphModule) -> dict[str, CloneModule]:
    """The clones in a grafted graph by name, in order of injection.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    return {name: cast(CloneModule, grafted.get_submodule(name)) for name in record_of(grafted).names}


def names_in(target: nn.Module) -> ClassNames:
    """The class names of a network's columns, clones included; empty if they are not known."""
    if not isinstance(target, GraftedModule):
        return ClassNames.of(target, "target")
    attributes = record_of(target).attributes
    facts, count = attributes.get("pretrained_cfg"), attributes.get("num_classes")
    own = columns_by_name(facts if isinstance(facts, Mapping) else {}, count if isinstance(count, int) else None)
    found = {name: list(numbers) for name, numbers in own.items()}
    for name, numbers in columns(target).items():
        for column, called in zip(numbers, modules_of(target)[name].class_names, strict=False):
            found.setdefault(plain(called), []).append(column)
    return ClassNames({name: tuple(numbers) for name, numbers in found.items()}, "target")


def own_columns(grafted: fx.GraphModule) -> range:
    """The target's own columns of a grafted graph's logits.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    record_of(grafted)
    (width,) = shape_of(own_logits(grafted)) or (0,)
    return range(width)


def columns(grafted: fx.GraphModule) -> dict[str, range]:
    """The columns of each clone in a grafted graph's logits, by name. They follow the target's, in order of injection.

    The range of a clone that is off is empty, unless columns are stable.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    return columns_without(grafted, lambda slot: slot.is_off)


def columns_without(grafted: fx.GraphModule, is_off: Callable[[Slot], bool]) -> dict[str, range]:
    """The columns of each clone; none for one that ``is_off`` says is off, unless columns are stable."""
    found, end = {}, len(own_columns(grafted))
    for branch, (name, clone) in zip(record_of(grafted).branches, modules_of(grafted).items(), strict=True):
        first = end if branch.first is None else branch.first
        gone = branch.first is None and clone.slot is not None and is_off(clone.slot)
        end = first if gone else first + len(clone.classes)
        found[name] = range(first, end)
    return found


def label_names(grafted: fx.GraphModule) -> tuple[str | None, ...]:
    """One name per column of a grafted graph's logits; None where it is not known, or where no clone is any more.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    own = own_columns(grafted)
    known = column_names(record_of(grafted).attributes, len(own)) or [None] * len(own)
    return *known, *added_names(grafted, columns(grafted))


def added_names(grafted: fx.GraphModule, of_clones: Mapping[str, range]) -> tuple[str | None, ...]:
    """A name for each column behind the target's own."""
    own, found = len(own_columns(grafted)), list[str | None]()
    for name, clone in modules_of(grafted).items():
        place = of_clones[name]
        found += [None] * (place.start - own - len(found))
        found += (clone.class_names or [None] * len(place)) if place else ()
    return tuple(found)


def own_nodes(grafted: fx.GraphModule) -> list[fx.Node]:
    """The target's own nodes of a grafted graph, in order, with its inputs and the output."""
    return [node for node in grafted.graph.nodes if BRANCH not in node.meta]


def own_logits(grafted: fx.GraphModule) -> fx.Node:
    """The target's node that gives its logits: what the cat at the end joins first, behind the node that holds it."""
    joined = logits_node(grafted)
    return cast(fx.Node, joined.args[0].args[0])  # type: ignore[union-attr]


VIEWS: dict[str, Callable[[GraftedModule], Any]] = {
    "clones": modules_of,
    "columns": columns,
    "label_names": label_names,
    "own": lambda grafted: tuple(own_nodes(grafted)),
    "forward_features": lambda grafted: forward_features(grafted, own_nodes(grafted)),
    "forward_head": lambda grafted: forward_head(grafted, own_nodes(grafted)),
    "get_classifier": lambda grafted: get_classifier(grafted, modules_of(grafted)),
}


def seat_of(grafted: fx.GraphModule, name: str) -> Seat:
    """Where a clone's columns are, and whether it is switched off for good; the first is known if they are stable.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    (branch,) = (branch for branch in record_of(grafted).branches if branch.name == name)
    slot = modules_of(grafted)[name].slot
    off = slot is not None and slot.off
    return Seat("packed" if branch.first is None else "stable", branch.first, off)


def read_by(grafted: fx.GraphModule, name: str) -> tuple[fx.Node, ...]:
    """The target's nodes that a clone reads: the tapped one, then its second input and those of its gate, if any.

    Raises
    ------
    ArgumentError
        If ``grafted`` holds no clones.
    """
    nodes = {node.name: node for node in own_nodes(grafted)}
    (branch,) = (branch for branch in record_of(grafted).branches if branch.name == name)
    return tuple(nodes[read] for read in branch.reads)


def record_of(grafted: fx.GraphModule) -> Record:
    if not isinstance(grafted, GraftedModule):
        raise ArgumentError(
            f"grafted: {type(grafted).__name__} holds no clones; pass the graph that netclone.inject(...) returned "
            "(of a compiled one, the module that was compiled)"
        )
    record: Record = grafted.meta[RECORD]
    return record


def present(record: Record, name: str) -> str:
    """The name itself.

    Raises
    ------
    CloneNameError
        If no clone has it.
    """
    if name not in record.names:
        near = difflib.get_close_matches(str(name), record.names, n=1, cutoff=0.0)[0]
        raise CloneNameError(
            f"name: no clone {name!r} in the graph, which holds {listed(record.names)}; did you mean '{near}'?"
        )
    return name


def listed(names: Sequence[str]) -> str:
    """Names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names)
