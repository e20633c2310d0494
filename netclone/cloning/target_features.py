"""forward_features, forward_head and get_classifier of a grafted network, as timm's networks have them.

They are those of the target, whose graph has no methods: :func:`find_head` looks for the nodes that give what the
target's own methods return. The clones have no part in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from netclone.cloning.modules import CloneModule
from netclone.errors import ArgumentError
from netclone.graph.capturing import FACTS
from netclone.graph.describing import facts_about
from netclone.graph.measuring import in_eval_mode
from netclone.graph.tracing import same_bits

HEAD = "netclone_head"
"""Key of what :func:`find_head` found, in ``GraphModule.meta``."""


@dataclass(frozen=True)
class Head:
    """The names of the target's nodes that give its features and what its classifier reads; None: there is no such."""

    features: str
    pooled: str | None = None


def find_head(grafted: fx.GraphModule, own: Sequence[fx.Node], target: nn.Module) -> None:
    """Note in a grafted graph where its target's features are; nothing is noted of a target without such methods.

    Parameters
    ----------
    own
        The target's nodes of the graph, in order.
    target
        The target itself, with timm's methods.
    """
    with in_eval_mode(target), in_eval_mode(grafted):
        head = _found(grafted, own, target)
    if head is not None:
        grafted.meta[HEAD] = head


def _found(grafted: fx.GraphModule, own: Sequence[fx.Node], target: nn.Module) -> Head | None:
    example = grafted.meta[FACTS]["example"]
    images = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    try:
        features = target.forward_features(images.clone())  # type: ignore[operator]
    except Exception:  # any model code may run here, and a target need not have the method
        return None
    first = _last_with(grafted, own, images, features)
    if first is None:
        return None
    try:
        pooled = target.forward_head(features.clone(), pre_logits=True)  # type: ignore[operator]
    except Exception:
        return Head(first)
    last = _last_with(grafted, own, images, pooled)
    part = last and _part(grafted, own, first, last)
    return Head(first, last if part and same_bits(part(features.clone()), pooled) else None)


def forward_features(grafted: fx.GraphModule, own: Sequence[fx.Node]) -> Callable[[Tensor], Tensor]:
    """The method of that name: images ``(N, C, H, W)`` to the target's features, bit by bit those of the target.

    Raises
    ------
    AttributeError
        If they are not known.
    """
    part = _part(grafted, own, None, _head(grafted, "forward_features").features)
    assert part is not None  # it begins at the images
    return part


def forward_head(grafted: fx.GraphModule, own: Sequence[fx.Node]) -> Callable[..., Tensor]:
    """The method of that name, which only goes as far as the classifier: clones read more than the features.

    Raises
    ------
    AttributeError
        If that is not known.
    """
    head = _head(grafted, "forward_head")
    if head.pooled is None:
        raise AttributeError("forward_head: what the target's classifier reads is not known")
    part = _part(grafted, own, head.features, head.pooled)
    assert part is not None  # as it was when it was found

    def forward(features: Tensor, pre_logits: bool = False) -> Tensor:
        if not pre_logits:
            raise ArgumentError(
                "pre_logits: the logits of a grafted network do not follow from the target's features alone, since "
                "clones read other positions too; call the network itself, or pass pre_logits=True for what the "
                "target's classifier reads"
            )
        pooled: Tensor = part(features)
        return pooled

    return forward


def get_classifier(grafted: fx.GraphModule, clones: Mapping[str, CloneModule]) -> Callable[[], tuple[nn.Module, ...]]:
    """The method of that name: the layer that gives the target's columns, and then the clones, in order.

    Raises
    ------
    AttributeError
        If the target's is not one module.
    """
    _head(grafted, "get_classifier")
    path = facts_about(grafted).get("classifier")
    found = dict(grafted.named_modules()).get(path) if isinstance(path, str) else None
    if not isinstance(found, (nn.Linear, nn.Conv2d)):
        raise AttributeError("get_classifier: the target's classifier is not one module")
    return lambda: (found, *clones.values())


def _head(grafted: fx.GraphModule, name: str) -> Head:
    head = grafted.meta.get(HEAD)
    if not isinstance(head, Head):
        raise AttributeError(f"{name}: a grafted network has it if timm made it of a file and its target has it")
    return head


class _Search(fx.Interpreter):
    """Runs a graph and notes the last of some nodes whose value is a tensor's, to the bit."""

    def __init__(self, graph: fx.GraphModule, nodes: Sequence[fx.Node], wanted: Tensor) -> None:
        super().__init__(graph)
        self.nodes, self.wanted = set(nodes), wanted
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n in self.nodes and n.op != "output" and isinstance(out, Tensor) and same_bits(out, self.wanted):
            self.found = n.name
        return out


def _last_with(graph: fx.GraphModule, nodes: Sequence[fx.Node], images: Tensor, wanted: object) -> str | None:
    if not isinstance(wanted, Tensor):
        return None
    search = _Search(graph, nodes, wanted)
    search.run(images.clone())
    return search.found


def _part(grafted: fx.GraphModule, own: Sequence[fx.Node], first: str | None, last: str) -> fx.GraphModule | None:
    """The target's nodes after one (None: from the images) up to another, on the same modules and tensors.

    None: the last one reads something that lies before the first.
    """
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    begun = first is None
    for node in own:
        if node.name == first:
            copied[node], begun = graph.placeholder("features"), True
        elif (begun or node.op == "get_attr") and all(read in copied for read in node.all_input_nodes):
            copied[node] = graph.node_copy(node, copied.__getitem__)
        if begun and node.name == last:
            break
    end = next((copy for node, copy in copied.items() if node.name == last), None)
    if end is None:
        return None
    graph.output(end)
    return fx.GraphModule(grafted, graph, type(grafted).__name__)
