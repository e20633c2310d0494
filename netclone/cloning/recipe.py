"""Recipe: everything a clone depends on apart from its networks, data, position and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypedDict

import torch

from netclone.arguments import Ablation, Effort, Method, MixedPrecision, Search, check_choice, check_number, words
from netclone.errors import ArgumentError
from netclone.learning.localizing import check_method
from netclone.learning.neighbourhoods import Augment
from netclone.learning.stepping import precision_of
from netclone.runtime.identity import identity

PARTS = words(Ablation)


EFFORTS: dict[Effort, int] = {"fast": 50, "balanced": 250, "best": 600}
"""The steps of distillation of each effort; docs/results/effort.json has what they take and give."""


@dataclass(frozen=True)
class Recipe:
    """How a clone is made: what :func:`netclone.clone` does with its networks and data, and in how many steps.

    Two clones of the same networks, data, position, size, seed and recipe are the same; not so with a budget of time.

    Parameters
    ----------
    search
        ``"early"``: from the deepest position up, until validation stops improving (the paper's rule), and then the
        input. ``"all"``: every candidate position.
    method
        How to localise (see :func:`netclone.localize`). ``"taylor"`` divides the budget among all layers here.
    effort, distill_steps
        For how many steps to distil the full source into the slim one: ``"fast"``, ``"balanced"`` or ``"best"`` (see
        :data:`EFFORTS`), or a number (0: none), which counts instead.
    mask_steps
        Steps in which ``method="local"`` learns its gates.
    reconstruct
        Whether to refit the layers that read removed channels by least squares. ``reconstruct=False``: the paper's
        plain copy, which is not distilled either.
    epochs, batch_size, validation
        Epochs of the fit at the chosen position (25 steps at each candidate), samples per step, and the share of the
        samples that is held out to choose by. At the input the classifier alone is fitted, which takes no epochs
        (0: nothing is fitted).
    augment
        ``augment(images, generator)`` returns another view of a batch, flipped, for example. All randomness has to come
        from the generator, which is on the CPU. Mask and distillation then see a new view at every step, adapter and
        classifier a few views of each sample.
    without
        Parts of the method to leave out, for ablations: ``"adapter_start"`` (the adapter starts at random instead of in
        closed form), ``"target_stream"`` (the new classifier does not read the target's logits), ``"calibration"`` (new
        logits come from the clone alone, and are fitted among themselves).
    round_to, latency_batch
        Keep widths that are multiples of so many channels (see :func:`netclone.localize`), and measure time for so many
        images at once, where the budget is one of time. None: multiples of 8, which processors are faster with, where
        the budget is one of MACs or time, else any widths.
    gate
        The share of the old classes' images that the clone need not see, in (0, 1): a router on the target's features
        leaves them out, which saves their time. None: the clone sees every image.
    mixed_precision
        ``"bf16"``: mask, distillation and fit learn in bfloat16, wherever torch.autocast uses it. The clone's tensors
        keep their dtype. Checks and closed-form refits are computed in full precision.

    Raises
    ------
    ArgumentError
        If a field is out of range.

    Examples
    --------
    >>> Recipe(epochs=5).search
    'early'
    >>> Recipe(epochs=-1)
    Traceback (most recent call last):
        ...
    netclone.errors.ArgumentError: epochs: got -1, expected a whole number from 0 on
    """

    search: Search = "early"
    method: Method = "taylor"
    reconstruct: bool = True
    effort: Effort = "balanced"
    distill_steps: int | None = None
    mask_steps: int = 100
    epochs: int = 20
    batch_size: int = 64
    validation: float = 0.2
    augment: Augment | None = None
    without: Sequence[Ablation] = ()
    mixed_precision: MixedPrecision = "no"
    round_to: int | None = None
    latency_batch: int = 1
    gate: float | None = None

    def __post_init__(self) -> None:
        check_method(self.method)
        check_choice(self.search, Search, "search")
        wrong = isinstance(self.without, str)
        unknown = [self.without] if wrong else [part for part in self.without if part not in PARTS]
        if unknown:
            raise ArgumentError(f"without: got {unknown}, expected some of {', '.join(map(repr, PARTS))}")
        object.__setattr__(self, "without", tuple(sorted(set(self.without))))
        check_number(self.epochs, "epochs", 0)
        check_number(self.batch_size, "batch_size", 1)
        if self.round_to is not None:
            check_number(self.round_to, "round_to", 1)
        check_number(self.latency_batch, "latency_batch", 1)
        check_choice(self.effort, Effort, "effort")
        check_number(self.mask_steps, "mask_steps", 0)
        check_number(self.steps, "distill_steps", 0)
        precision_of(self.mixed_precision)
        if self.gate is not None and (not isinstance(self.gate, (int, float)) or not 0 < self.gate < 1):
            raise ArgumentError(f"gate: got {self.gate!r}, expected a share in (0, 1), such as 0.5, or None")
        if not isinstance(self.validation, (int, float)) or not 0 < self.validation < 1:
            raise ArgumentError(f"validation: got {self.validation!r}, expected a share in (0, 1), such as 0.2")

    @property
    def precision(self) -> torch.dtype | None:
        """The dtype of forward passes while training; None: that of the images."""
        return precision_of(self.mixed_precision)

    @property
    def steps(self) -> int:
        """Steps of distillation."""
        return EFFORTS[self.effort] if self.distill_steps is None else self.distill_steps

    def facts(self) -> dict[str, object]:
        """The fields as plain data, with the steps that are meant; an augmentation is represented by its identity."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        known |= {"distill_steps": self.steps, "augment": None if self.augment is None else identity(self.augment)}
        return known


class RecipeFields(TypedDict, total=False):
    """The fields of a :class:`Recipe`, which :func:`netclone.clone` also takes as keywords."""

    search: Search
    method: Method
    reconstruct: bool
    effort: Effort
    distill_steps: int | None
    mask_steps: int
    epochs: int
    batch_size: int
    validation: float
    augment: Augment | None
    without: Sequence[Ablation]
    mixed_precision: MixedPrecision
    round_to: int | None
    latency_batch: int
    gate: float | None
