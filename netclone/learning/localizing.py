"""localize(source) -> ChannelMask: which units carry the cloned classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netclone.arguments import Budget, Method, MixedPrecision, Sharing, check_choice, check_number, words
from netclone.channels.budgeting import Allocation, Measure, channel_share, units_kept
from netclone.channels.gates import Gated, gate_vector
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.channels.masks import ChannelMask
from netclone.errors import ArgumentError
from netclone.graph.capturing import tensor_at
from netclone.graph.class_names import ClassNames
from netclone.graph.outputs import Output
from netclone.learning.data import (
    Batches,
    Classes,
    Samples,
    balance,
    check_classes,
    check_keep,
    check_taken,
    gather,
    in_batches,
)
from netclone.learning.depth import without_recoverable, without_similar
from netclone.learning.neighbourhoods import Augment, Neighbourhoods, answered, drawn
from netclone.learning.stepping import Loop, fast_forward, precision_of, step
from netclone.runtime.devices import device_named, model_on, on_device
from netclone.runtime.entering import entered
from netclone.runtime.resuming import Unfinished
from netclone.runtime.sharing import ALONE, Workers

TAYLOR_SAMPLES, TAYLOR_BATCH = 512, 8
REUSE = 3  # steps that a point of a neighbourhood is used in: the full source's answer for it is computed once
LEARNING_RATE = 0.08  # of standardised scores; falls to zero over the steps
FROM_SAMPLES: tuple[Method, ...] = ("local", "taylor", "cka")


@entered()
def localize(  # noqa: PLR0913 - public
    source: nn.Module | ChannelGroups,
    data: Batches | None = None,
    *,
    classes: Classes | None = None,
    method: Method = "local",
    keep: float = 0.5,
    budget: Budget = "channels",
    allocation: Sharing | None = None,
    round_to: int = 1,
    latency_batch: int = 1,
    seed: int = 0,
    steps: int = 100,
    batch_size: int = 64,
    augment: Augment | None = None,
    mixed_precision: MixedPrecision = "no",
    device: str | torch.device | None = None,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers = ALONE,
    unfinished: Unfinished | None = None,
    output: Output = None,
) -> ChannelMask:
    """Choose the channels that carry the cloned classes, under a budget, without changing any weight.

    Parameters
    ----------
    source
        The network to clone from: a module, a traced graph, or the groups found in one, which saves finding them again.
    data
        Images ``(N, C, H, W)`` and labels ``(N,)`` in the source's label space, in any form that :func:`netclone.clone`
        takes. Needed by ``"local"``, ``"taylor"`` and ``"cka"``. From samples of other classes the mask learns what
        tells the cloned ones apart.
    classes
        The classes to clone, or one, by column or by name. None: all of the source's.
    method
        ``"local"``: learn gates with which the masked source agrees with the full one around the samples, while the
        budget shrinks. ``"taylor"``: first-order change of the loss. ``"magnitude"``: norm of the weights.
        ``"random"``: by chance. ``"cka"``: whole residual blocks, of those whose outputs are most similar (MPruner,
        arXiv 2408.13482).
    keep, budget
        How much to keep at most, in (0, 1]: a share of the units in every channel group (``"channels"``), of the
        source's parameters (``"params"``), of its MACs (``"macs"``), or of the time it takes (``"latency"``), measured
        here and now for ``latency_batch`` images. The size is that of :func:`netclone.extract`'s result, which has only
        the outputs of ``classes``; for ``"latency"`` its BatchNorms are folded. At least one unit of every group stays,
        except with ``"cka"``, or where a budget of time that is divided by samples is better spent without some
        residual blocks. Whether it is, is tried on some samples, with a refit.
    allocation
        How a budget of parameters, MACs or time is divided among the groups: ``"global"``, by score and cost;
        ``"uniform"``, the same share of each. None: global for ``"local"``, uniform for the other methods.
    round_to
        Keep widths that are multiples of this many channels, such as 8, which most hardware is faster with. Groups of
        less than twice that many channels are not rounded, nor are those of which only a few are left.
    latency_batch
        Images at a time, for ``budget="latency"``.
    seed
        Seed of everything random; the same seed gives the same mask, but for ``budget="latency"``: no two measurements
        of time are the same.
    steps, batch_size
        Number of steps (of ``"local"``), and samples per step.
    augment
        For ``"local"``: ``augment(images, generator)`` returns another view of a batch, flipped, for example. All
        randomness has to come from the generator, which is on the CPU.
    mixed_precision
        ``"bf16"``, for ``"local"``: compute the masked source's passes in bfloat16, wherever torch.autocast uses it.
    device
        Where to learn; a copy of the source and each batch are moved there. None: where the source is.
    progress
        Called with ``(step, steps)``.
    workers
        The processes that share the work (see :func:`netclone.runtime.sharing.share`). Each has to be given the same
        data and gets the same result.
    unfinished
        For ``"local"``: where to keep the state of the learning, and to continue from.
    output
        Which part of what the source returns is its logits, as for :func:`netclone.trace`.

    Raises
    ------
    ArgumentError
        If ``keep``, ``budget``, ``classes`` or ``method`` is out of range, the budget is too small, the method needs
        data and got none, or ``augment`` returns anything but a view of its images.
    DataError
        If the data are empty, not finite, or labelled outside the source's classes.

    Examples
    --------
    >>> import timm, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> netclone.localize(source, method="magnitude", keep=0.25).share < 0.3
    True

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3.2 (localisation by local fidelity).
    """
    check_method(method)
    check_keep(keep)
    check_number(steps, "steps", 0)
    check_number(batch_size, "batch_size", 1)
    precision = precision_of(mixed_precision)
    if data is None and method in FROM_SAMPLES:
        raise ArgumentError(
            f"data: method {method!r} learns from samples and got none; pass an iterable of (images, labels), or use "
            "method='magnitude'"
        )
    _check_allocation(allocation, budget, method)
    measure = Measure(budget, round_to, latency_batch, workers)
    place = device_named(device)
    names = source.names if isinstance(source, ChannelGroups) else ClassNames.of(source, "source")
    samples = None if data is None else gather(data, "data", place, names)
    if place is not None and isinstance(source, nn.Module):
        source = model_on(source, place)
        example_inputs = on_device(example_inputs, place)
    if example_inputs is None and samples is not None:
        example_inputs = samples.images[:2]
        if isinstance(source, nn.Module):
            check_taken(source, example_inputs, "data", "source")
    groups = channel_groups(source, example_inputs, output=output)
    wanted = check_classes(classes, groups.outputs, names)
    if method == "cka":
        assert samples is not None
        return _masked(groups, _by_blocks(groups, samples, wanted, keep, measure))
    divided = _divided(groups, wanted, allocation or ("global" if method == "local" else "uniform"), keep, measure)
    share = channel_share(groups, keep, measure, wanted) if divided is None else keep

    def best(scores: Sequence[Tensor]) -> ChannelMask:
        flags = _flags(groups, scores, share, round_to) if divided is None else divided.exact_flags(scores, share)
        return _masked(groups, flags)

    def ranked(scores: Sequence[Tensor]) -> list[Tensor]:
        return list(scores) if divided is None else _by_cost(divided, scores)

    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return best(ranked([torch.rand(g.size, generator=generator) for g in groups.groups]))
    if method == "magnitude":
        return best(ranked(_magnitudes(groups)))
    assert samples is not None
    _check_samples(groups, samples, wanted)
    if keep == 1 or not groups.groups:  # nothing to choose
        return best([torch.zeros(group.size) for group in groups.groups])
    gated = Gated(groups)
    scores = ranked(_taylor(gated, samples, wanted, workers))
    if divided is not None and budget == "latency":
        divided = without_recoverable(samples, divided, lambda sizes: sizes.exact_flags(scores, keep), workers)
    if method == "taylor":
        return best(scores)
    if divided is None:
        start = [_standardised(score) for score in scores]
    else:
        start = list(_standardised(torch.cat(scores)).split([len(score) for score in scores]))

    def choose(scores: Sequence[Tensor], share: float) -> list[Tensor]:
        return _flags(groups, scores, share, round_to) if divided is None else divided.flags(scores, share)

    around = Neighbourhoods(samples.images, _both_sides(samples, wanted), augment)
    return best(
        _local(
            gated,
            around,
            wanted,
            start,
            choose,
            share,
            steps,
            Loop(batch_size, generator, workers, precision, progress, unfinished),
        )
    )


def _masked(groups: ChannelGroups, flags: Sequence[Tensor]) -> ChannelMask:
    return ChannelMask.from_kept(groups, {g.name: f.tolist() for g, f in zip(groups.groups, flags, strict=True)})


def _check_samples(groups: ChannelGroups, samples: Samples, classes: tuple[int, ...]) -> None:
    samples.check_images(groups.example, "source")
    samples.check_labels(groups.outputs, "source")
    samples.of_classes(classes)  # each of them must occur


def _by_blocks(
    groups: ChannelGroups, samples: Samples, classes: tuple[int, ...], keep: float, measure: Measure
) -> list[Tensor]:
    """Per group, which units stay if whole blocks go, the most similar ones."""
    _check_samples(groups, samples, classes)
    return without_similar(groups, samples, keep, Allocation(groups, measure, classes).share, measure.workers)


def _divided(
    groups: ChannelGroups, classes: tuple[int, ...], allocation: Sharing, keep: float, measure: Measure
) -> Allocation | None:
    """How a budget is divided among the groups; None if every group keeps the same share."""
    if groups.groups and measure.budget != "channels" and keep < 1 and allocation == "global":
        return Allocation(groups, measure, classes)
    return None


def _check_allocation(allocation: Sharing | None, budget: Budget, method: Method) -> None:
    if allocation not in (None, *words(Sharing)):
        raise ArgumentError(
            f"allocation: got {allocation!r}, expected one of {', '.join(map(repr, words(Sharing)))} or None"
        )
    if allocation == "global" and budget == "channels":
        raise ArgumentError(
            "allocation: 'global' divides a budget of parameters, MACs or time; with budget='channels' every group "
            "keeps the same share: give budget='params', 'macs' or 'latency'"
        )
    if allocation is not None and method == "cka":
        raise ArgumentError("allocation: method 'cka' keeps or removes whole blocks and divides nothing: leave it out")


def check_method(method: Method) -> None:
    """Raise unless there is such a method."""
    check_choice(method, Method, "method")


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std(unbiased=False).clamp_min(1e-12)


def _by_cost(allocation: Allocation, scores: Sequence[Tensor]) -> list[Tensor]:
    """Log of the squared score per unit of cost: the change of the loss per parameter (or MAC)."""
    floor = 1e-6 * torch.cat(list(scores)).square().mean().clamp_min(1e-30)
    return [((score.square() + floor) / cost).log() for score, cost in zip(scores, allocation.unit_costs, strict=True)]


def _flags(groups: ChannelGroups, scores: Sequence[Tensor], share: float, round_to: int) -> list[Tensor]:
    """Per group, True for the best ``share`` of the units (at least one); ties go to the first."""
    flags = []
    for group, score in zip(groups.groups, scores, strict=True):
        best = torch.sort(score.detach(), descending=True, stable=True).indices[: units_kept(group, share, round_to)]
        flags.append(torch.zeros(len(score), dtype=torch.bool).index_fill_(0, best.cpu(), True))
    return flags


def _magnitudes(groups: ChannelGroups) -> list[Tensor]:
    """L2 norm of every unit's slices of producer weights, each tensor on its own scale."""
    labelling = groups.labelling
    scores = {unit: 0.0 for group in groups.groups for unit in group.units}
    for (name, axis), labels in labelling.slots.items():
        if labelling.roles[name, axis] not in ("out", "along") or not name.endswith(("weight", "weight_folded")):
            continue
        tensor = tensor_at(groups.graph_module, name).detach().double()
        norms = tensor.movedim(axis, 0).flatten(1).norm(dim=1) if tensor.dim() > 1 else tensor.abs()
        norms = norms / norms.mean().clamp_min(1e-12)
        for units in labelling.labels.parts(labelling.labels.roots(labels)).tolist():
            for unit, norm in zip(units, norms.tolist(), strict=True):
                if unit in scores:
                    scores[unit] += norm
    return [torch.tensor([scores[unit] for unit in group.units]) for group in groups.groups]


def _taylor(gated: Gated, samples: Samples, classes: tuple[int, ...], workers: Workers) -> list[Tensor]:
    """Root of the summed square first-order change of the loss per unit: the gradient at an open gate.

    The loss is that of telling the cloned classes from each other and from the rest. Batches are small and shuffled,
    because in larger ones the gradients of different samples cancel.
    """
    weights = _both_sides(samples, classes)
    order = drawn(weights, TAYLOR_SAMPLES, torch.Generator().manual_seed(0), repeat=False)
    images, labels = (tensor[order.to(tensor.device)] for tensor in (samples.images, samples.labels))
    gates = [torch.ones(size, device=images.device, requires_grad=True) for size in gated.sizes]
    columns = torch.tensor(classes, device=images.device)
    is_class = labels[:, None] == columns
    targets = torch.where(is_class.any(1), is_class.int().argmax(1), len(classes))
    parts = list(zip(images.split(TAYLOR_BATCH), targets.split(TAYLOR_BATCH), strict=True))
    team = workers.team(len(parts))
    gradients = []
    for part, target in parts[team.own(len(parts))]:
        out = gated(gate_vector(gates), part)
        loss = F.cross_entropy(_local_logits(out, columns), target)
        gradients.append(torch.cat(torch.autograd.grad(loss, gates)))
    total = torch.zeros_like(gradients[0])
    for gradient in team.joined(torch.stack(gradients)):  # in the same order, whichever worker computed them
        total += gradient.square()
    return list(total.sqrt().cpu().split(gated.sizes))


def _local(
    gated: Gated,
    around: Neighbourhoods,
    classes: tuple[int, ...],
    start: Sequence[Tensor],
    choose: Callable[[Sequence[Tensor], float], list[Tensor]],
    keep: float,
    steps: int,
    loop: Loop,
) -> list[Tensor]:
    """Learn one score per unit so that the kept part agrees with the full source around the samples.

    A point of a neighbourhood is a sample mixed with another and perturbed. Agreement is about the logits of the cloned
    classes against each other and against the strongest of the rest. Only a third of the points are new at each step,
    so the full source's answers cost little beside the masked source's gradient. In the forward pass gates are hard
    (``choose`` picks the units for the present budget), and they pass the gradient straight through. The budget shrinks
    from everything to ``keep``.

    While nothing is masked yet, the gradient is only rounding, which Adam nevertheless scales to full steps. So each
    worker then computes the whole batch as a single process would, and likewise the full source's answers.
    """
    images, batch_size = around.images, loop.batch_size
    scores = [score.to(images.device).clone().requires_grad_() for score in start]
    optimizer = torch.optim.Adam(scores, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=max(steps, 1))
    full = in_batches(gated.full, images[:: max(1, len(images) // TAYLOR_SAMPLES)], batch_size, loop.workers)
    scale = full.std().clamp_min(1e-6)
    columns = torch.tensor(classes, device=images.device)
    first, last = loop.restored(scores, optimizer)
    fast_forward(schedule, first)
    neighbourhoods = answered(
        lambda count: around.nearby(count, loop.generator),
        lambda points: _local_logits(in_batches(gated.full, points, batch_size), columns),
        batch_size,
        REUSE,
        last,
    )
    for done, (points, want) in enumerate(islice(neighbourhoods, steps - first), first):
        share = keep + (1 - keep) * max(0.0, 1 - done / (0.6 * steps)) ** 2
        flags = choose(scores, share)
        gates = [flag.to(score) + score - score.detach() for score, flag in zip(scores, flags, strict=True)]
        team = loop.workers if not all(bool(flag.all()) for flag in flags) else ALONE
        vector = gate_vector(gates)

        def loss_of(points: Tensor, want: Tensor, vector: Tensor = vector) -> Tensor:
            got = _local_logits(gated(vector, points).to(points.dtype), columns)
            agreement = F.kl_div(got.log_softmax(1), want.log_softmax(1), log_target=True, reduction="batchmean")
            return agreement + 0.1 * F.mse_loss(got / scale, want / scale)

        step(optimizer, loss_of, (points, want), f"localize, step {done}", team, loop.precision)
        schedule.step()
        loop.keep(done + 1, scores, optimizer, (points, want))
        loop.tell(done + 1, steps)
    return [score.detach().cpu() for score in scores]


def _both_sides(samples: Samples, classes: tuple[int, ...]) -> Tensor:
    """How often to draw each sample, so that the cloned classes and the rest are drawn equally often."""
    return balance(torch.isin(samples.labels, torch.tensor(classes, device=samples.labels.device)).long(), 1)


def _local_logits(logits: Tensor, columns: Tensor) -> Tensor:
    """Logits of the cloned classes and, as one more column, the strongest of the rest."""
    rest = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device).index_fill_(0, columns, False)
    if not rest.any():
        return logits[:, columns]
    return torch.cat([logits[:, columns], logits[:, rest].amax(1, keepdim=True)], 1)
