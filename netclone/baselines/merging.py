"""zipit(problem, recipe): target and source of one architecture merged into one network, up to some stage."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from netclone.baselines.ensembling import calibrate
from netclone.baselines.finetuning import stages
from netclone.baselines.problems import InapplicableError, Problem, Recipe, classifier
from netclone.baselines.training import validated
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.cloning.extracting import extract
from netclone.errors import NetcloneError
from netclone.graph.tracing import position
from netclone.metrics.evaluating import predict

SAMPLES = 128  # images that features are compared on
PLACES = 64  # positions of each feature map that are compared


class Zipped(nn.Module):
    """A shared trunk, whose features each of two tails reads in its own network's order of channels."""

    first: Tensor
    second: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, trunk: nn.Module, tails: tuple[nn.Module, nn.Module], orders: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.trunk = trunk
        self.target, self.source = tails
        self.register_buffer("first", orders[0])
        self.register_buffer("second", orders[1])
        self.register_buffer("scale", torch.ones((), device=orders[0].device))
        self.register_buffer("bias", torch.zeros((), device=orders[0].device))

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        old, new = self.target(features[:, self.first]), self.source(features[:, self.second])
        return torch.cat([old, self.scale * new + self.bias], 1)


def zipit(problem: Problem, recipe: Recipe) -> nn.Module:
    """Target and source merged into one trunk by averaging similar channels, with a tail for each network behind it.

    Of the 2n channels that both networks have at a place, the two most correlated ones are averaged, from one network
    or from both, then the next two, until n are left. With ``M`` that averages them and ``U`` that gives each channel
    the average that it went into, a layer's weights become ``W = M_A W_A U_A + M_B W_B U_B``. The statistics of
    BatchNorm are measured again. Nothing is trained. A trunk ends behind a stage, or before the classifiers (all is
    zipped). Which is best is chosen on the validation samples, each after a scale and bias of the new logits is fitted
    as for the calibrated ensemble. The paper tells the model which task an image belongs to, or lets it compare the
    logits of both as they are.

    Not as in the paper: channels that can only be removed together are averaged together, their correlations those of
    all layers that read them. A BatchNorm's scale goes into its convolution first, and its weight and bias become the
    averages of the absolute scales and biases. The tails keep their statistics. Nothing limits merges within a network.
    Old logits change.

    Raises
    ------
    InapplicableError
        If both networks have not the same layers, or some channels cannot be put in another order.

    Reference: Stoica et al., ZipIt! Merging Models from Different Tasks without Training (ICLR 2024, arXiv 2305.03053),
    the parts on the zip operation and on partial zipping; the authors' code, github.com/gstoica27/ZipIt,
    ``matching_functions.py``: ``match_tensors_zipit``.
    """
    pair = [copy.deepcopy(model).eval() for model in (problem.target, problem.source)]
    images = problem.train.images
    heads = [classifier(model, predict(model, images[:2]).shape[1]) for model in pair]
    path = heads[0][0]
    shapes = [[(n, p.shape) for n, p in m.named_parameters() if not n.startswith(f"{path}.")] for m in pair]
    if path != heads[1][0] or shapes[0] != shapes[1]:
        raise InapplicableError("zipit: target and source are not of one architecture")
    groups = channel_groups(pair[0], images[:2])
    merge = Merge(groups, path, pair, images)
    trunk = merge.merged()
    _measure_norms(trunk, images)
    found = [merge.whole(trunk, [head[1] for head in heads], problem.classes)]
    for name, stage in stages(trunk)[:-1]:
        if isinstance(stage, nn.Conv2d):  # a BatchNorm may follow, whose scale is in it
            continue
        try:
            found.append(merge.partial(trunk, name, tuple(range(problem.old)), problem.classes))
        except NetcloneError:
            continue  # not every stage is a place where all paths meet
    for model in found:
        calibrate(problem, model)
    scores = [validated(model, problem.validation, problem.old) for model in found]
    return found[scores.index(max(scores))].eval()


class Merge:
    """Which channels of two networks are averaged, and what follows for every tensor.

    Raises
    ------
    InapplicableError
        If some channels cannot be put in another order.
    """

    def __init__(self, groups: ChannelGroups, head: str, pair: list[nn.Module], images: Tensor) -> None:
        self.groups, self.head, self.pair = groups, head, pair
        self.place = {u: (g, i) for g, group in enumerate(groups.groups) for i, u in enumerate(group.units)}
        labelling = groups.labelling
        self.slots = {slot: self.units(labels) for slot, labels in labelling.slots.items()}
        for (name, axis), units in self.slots.items():
            if labelling.roles[name, axis] != "in" and None in units and not name.startswith(f"{head}."):
                raise InapplicableError(f"zipit: the channels of {name} cannot be put in another order")
        seen = [self._seen(model, images) for model in pair]
        self.into = [zipped(seen[0][g], seen[1][g]) for g in range(len(groups.groups))]

    def units(self, labels: Tensor) -> list[tuple[int, int] | None]:
        """Group and number of each label's unit; None where there is none."""
        known = self.groups.labelling.labels
        units = known.parts(known.roots(labels.flatten()))[0].tolist()
        return [self.place.get(unit) for unit in units]

    def order(self, units: list[tuple[int, int] | None], network: int) -> Tensor:
        """For each slice of a network, the slice of the merged network that it went into."""
        at: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, place in enumerate(units):
            if place is not None:
                at[place].append(i)
        order = list(range(len(units)))
        for (group, unit), slices in at.items():
            into = at[group, int(self.into[group][network][unit])]
            for mine, merged in zip(slices, into, strict=True):
                order[mine] = merged
        return torch.tensor(order)

    def merged(self) -> nn.Module:
        """The first network with the weights of both; its classifier stays."""
        folded = [_folded(model, self.groups.example) for model in self.pair]
        model = copy.deepcopy(self.pair[0])
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                axes = [axis for owner, axis in self.slots if owner == name]
                if not axes or name.startswith(f"{self.head}."):
                    continue
                tensor.zero_()
                for network, state in enumerate(folded):
                    part = state[name]
                    for axis in axes:
                        order = self.order(self.slots[name, axis], network).to(part.device)
                        reads = self.groups.labelling.roles[name, axis] == "in"
                        part = torch.zeros_like(part).index_add_(axis, order, part if reads else part / 2)
                    tensor.add_(part)
        return model

    def whole(self, trunk: nn.Module, heads: list[nn.Linear], classes: tuple[int, ...]) -> Zipped:
        """Both networks up to their classifiers as one."""
        body = copy.deepcopy(trunk)
        path, _, leaf = self.head.rpartition(".")
        setattr(body.get_submodule(path), leaf, nn.Identity())
        second = nn.Linear(heads[1].in_features, len(classes), heads[1].bias is not None).to(heads[1].weight)
        with torch.no_grad():
            second.weight.copy_(heads[1].weight[list(classes)])
            if heads[1].bias is not None:
                second.bias.copy_(heads[1].bias[list(classes)])
        return self._joined(body, (heads[0], second), self.slots[f"{self.head}.weight", 1])

    def partial(self, trunk: nn.Module, at: str, old: tuple[int, ...], new: tuple[int, ...]) -> Zipped:
        """Both networks up to a position as one, and what follows twice."""
        node = position(self.groups.graph_module, at)
        labels = cast("Tensor", self.groups.labelling.value(node))
        units = self.units(labels[0].flatten(1)[:, 0] if labels.dim() == 4 else labels.flatten())
        captured = channel_groups(trunk, self.groups.example)
        tails = []
        for model, classes in zip(self.pair, (old, new), strict=True):
            groups = channel_groups(model, self.groups.example)
            tails.append(extract(groups, ChannelMask.from_kept(groups, {}), at=at, classes=classes))
        return self._joined(_before(captured.graph_module, at), (tails[0], tails[1]), units)

    def _joined(
        self, trunk: nn.Module, tails: tuple[nn.Module, nn.Module], units: list[tuple[int, int] | None]
    ) -> Zipped:
        orders = [self.order(units, network).to(self.groups.example.device) for network in (0, 1)]
        return Zipped(trunk, tails, (orders[0], orders[1])).eval()

    def _seen(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        """Standardised features ``(units, samples)`` of each group, as the layers that read them see them."""
        rows: list[list[Tensor]] = [[] for _ in self.groups.groups]

        def keep(units: list[tuple[int, int] | None], module: nn.Module, inputs: Any) -> None:
            x = inputs[0].detach().double()
            x = x.flatten(2)[:, :, :: max(1, x.flatten(2).shape[2] // PLACES)] if x.dim() == 4 else x.flatten(0, -2)
            x = x.transpose(0, 1).flatten(1) if x.dim() == 3 else x.T
            found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for unit, row in zip(units, x, strict=True):
                if unit is not None:
                    found[unit].append(row)
            for group in {group for group, _ in found}:
                size = self.groups.groups[group].size
                if all((group, i) in found for i in range(size)):
                    rows[group].append(torch.stack([torch.cat(found[group, i]) for i in range(size)]))

        hooks = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(partial(keep, units))
            for (name, axis), units in self.slots.items()
            if axis == 1 and self.groups.labelling.roles[name, axis] == "in" and name.endswith(".weight")
        ]
        try:
            with torch.no_grad():
                model(images[:SAMPLES])
        finally:
            for hook in hooks:
                hook.remove()
        if not all(rows):
            raise InapplicableError("zipit: some channels are read by no layer whose input can be seen")
        return [torch.cat([_standardised(part) for part in parts], 1) for parts in rows]


def zipped(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """For each of two networks' features ``(n, samples)``, which of n averages each goes into.

    Examples
    --------
    >>> a, b, c = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])
    >>> zipped(torch.stack([a, b]), torch.stack([b, a]))
    (tensor([0, 1]), tensor([1, 0]))
    >>> zipped(torch.stack([a, a]), torch.stack([b, c]))
    (tensor([0, 0]), tensor([1, 1]))
    """
    both = torch.cat([first, second])
    alike = (both @ both.T).fill_diagonal_(-torch.inf)
    into = torch.zeros(len(both), dtype=torch.long, device=both.device)
    for number in range(len(first)):
        i, j = divmod(int(alike.argmax()), len(both))
        into[i] = into[j] = number
        alike[[i, j]] = alike[:, [i, j]] = -torch.inf
    return into[: len(first)], into[len(first) :]


def _standardised(rows: Tensor) -> Tensor:
    away = rows - rows.mean(1, keepdim=True)
    return nn.functional.normalize(away)


def _folded(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """A network's tensors with every BatchNorm's scale in the convolution before it, and its size as its weight."""
    made: dict[int, str] = {}
    read: dict[str, str] = {}
    kept: list[Tensor] = []  # so that no two tensors have one identity

    def gave(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output)
        made[id(output)] = name

    def reads(name: str, module: nn.Module, inputs: Any) -> None:
        if id(inputs[0]) in made:
            read[name] = made[id(inputs[0])]

    hooks = [m.register_forward_hook(partial(gave, n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    hooks += [m.register_forward_pre_hook(partial(reads, name)) for name, m in norms.items()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, convolution in read.items():
        norm = norms[name]
        if norm.running_var is None or norm.weight is None:
            continue
        scale = state[f"{name}.weight"] / (norm.running_var + norm.eps).sqrt()
        for part in ("weight", "bias"):
            if (tensor := state.get(f"{convolution}.{part}")) is not None:
                tensor.mul_(scale.view(-1, *(1,) * (tensor.dim() - 1)))
        state[f"{name}.weight"].abs_()
    return state


def _measure_norms(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every BatchNorm to those of some images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    with torch.no_grad():
        for part in images.split(SAMPLES):
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _before(graph_module: fx.GraphModule, at: str) -> nn.Module:
    """The part of an operator graph up to a position."""
    end = position(graph_module, at)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op != "output":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[end])
    graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph, "Trunk").eval()
