"""SubProblem: some classes of a source, samples of them, and what a module that is made of the source has to answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from netclone.baselines.ensembling import fitted_scale
from netclone.channels.grouping import ChannelGroups, channel_groups
from netclone.errors import ArgumentError
from netclone.learning.data import Samples, balance, check_classes
from netclone.learning.neighbourhoods import Augment
from netclone.metrics.evaluating import predict


@dataclass(frozen=True)
class SubProblem:
    """A part of what a source does, without a target.

    Of one class the question is whether an image shows it: column 0 says no, column 1 yes, and both kinds of images
    count the same. Of several classes the question is which of them an image shows: column ``i`` is ``classes[i]``.

    Parameters
    ----------
    source
        A classifier; never changed.
    classes
        Its classes that matter.
    shown, held_out
        Samples to learn from and to choose by, with the source's labels: of all classes if one is asked for, otherwise
        of the ``classes`` alone.
    augment
        Changes a training batch ``(N, C, H, W)``.

    Raises
    ------
    ArgumentError
        If ``classes`` is empty, has repetitions, or is not a part of the source's.
    """

    source: nn.Module
    classes: tuple[int, ...]
    shown: Samples
    held_out: Samples
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_classes(self.classes, self.outputs)
        if len(self.classes) == self.outputs:
            raise ArgumentError(f"classes: got all {self.outputs} of the source's, expected a part of them")

    @cached_property
    def outputs(self) -> int:
        """The number of the source's classes."""
        return predict(self.source, self.shown.images[:1]).shape[1]

    @cached_property
    def groups(self) -> ChannelGroups:
        """The source's channels that belong together."""
        return channel_groups(self.source, self.shown.images[:2])

    @property
    def old(self) -> int | None:
        """1 if one class is asked for, so that :func:`~netclone.baselines.validated` counts both answers alike."""
        return 1 if len(self.classes) == 1 else None

    @property
    def columns(self) -> tuple[int, ...]:
        """The source's classes whose logits an answer needs: all, to tell one from the rest."""
        return tuple(range(self.outputs)) if self.old else self.classes

    @property
    def answers(self) -> int:
        """The number of answers."""
        return 2 if self.old else len(self.classes)

    @property
    def train(self) -> Samples:
        """The samples to learn from, labelled with the answers."""
        return self.answered(self.shown)

    @property
    def validation(self) -> Samples:
        """The samples to choose by, labelled with the answers."""
        return self.answered(self.held_out)

    def answered(self, samples: Samples) -> Samples:
        """Samples with the answers instead of the source's labels."""
        is_class = samples.labels[:, None] == torch.tensor(self.classes, device=samples.labels.device)
        labels = is_class[:, 0].long() if self.old else is_class.int().argmax(1)
        return Samples(samples.images, labels, samples.what)

    def weights(self, labels: Tensor) -> Tensor:
        """How much each sample counts, by its answer ``(N,)``."""
        return torch.ones(len(labels), device=labels.device) if self.old is None else balance(labels, self.old)


class Part(nn.Module):
    """A network and what makes answers ``(N, answers)`` of its logits, on the network's device."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head.to(next(body.parameters()).device)

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.head(self.body(images))
        return answers


class Told(nn.Module):
    """Answers that the source's own logits give: the class against the sum of the rest, or the classes' logits.

    Of one class, ``scale`` and ``bias`` belong to the yes.

    Examples
    --------
    >>> yes = Told((0, 1, 2), (2,))
    >>> yes(torch.tensor([[0.0, 0.0, 1.0]])).softmax(1)[0, 1] == torch.tensor([0.0, 0.0, 1.0]).softmax(0)[2]
    tensor(True)
    >>> Told((3, 5), (5, 3))(torch.tensor([[1.0, 2.0]]))
    tensor([[2., 1.]])
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, columns: tuple[int, ...], classes: tuple[int, ...]) -> None:
        super().__init__()
        self.own = [columns.index(label) for label in classes]
        self.rest = [i for i in range(len(columns)) if i not in self.own]
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("bias", torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        own = logits[:, self.own]
        if len(self.own) > 1:
            return own
        return torch.cat([logits[:, self.rest].logsumexp(1, keepdim=True), self.scale * own + self.bias], 1)


class Given(nn.Module):
    """The source's answer as it is: its class must come before all of its classes, the ones outside included."""

    def __init__(self, source: nn.Module, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.source = source
        self.classes = list(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.source(images)
        outside = [i for i in range(logits.shape[1]) if i not in self.classes]
        rest = logits[:, outside].amax(1, keepdim=True)
        return torch.cat(
            [rest, logits[:, self.classes]] if len(self.classes) == 1 else [logits[:, self.classes], rest], 1
        )


def calibrated(part: Part, problem: SubProblem) -> Part:
    """The same, in place, with scale and bias of a yes fitted on all samples; several classes need none."""
    if problem.old and isinstance(part.head, Told):
        both = [problem.train, problem.validation]
        logits = torch.cat([predict(part, samples.images) for samples in both])
        labels = torch.cat([samples.labels for samples in both])
        part.head.scale, part.head.bias = fitted_scale(Samples(logits, labels, "data"), problem.old, 1, 1.0)
    return part
