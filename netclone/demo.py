"""run() -> DemoResult: clone three classes of handwritten digits from one network into another, in about a minute.

lay_out() only leaves the digits in folders and the two networks on disk, to clone between on the command line.

A target (a small ResNet) learns the digits 0 to 6, and a source (a small EfficientNet) all ten. The target then gets 7,
8 and 9 from the source. Every claim is checked, and a claim that is not true ends the demo with an error.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import save_for_hf
from torch import Tensor, fx, nn
from torch.nn import functional as F

import netclone
from netclone.cloning.injecting import inject, remove
from netclone.cloning.method import clone
from netclone.cloning.modules import CloneModule, load, save
from netclone.errors import ArgumentError, NetcloneError
from netclone.files.spec import Candidate
from netclone.graph.preparing import preparation
from netclone.graph.tracing import same_bits, trace
from netclone.metrics.evaluating import Cost, Scores, cost, evaluate, predict
from netclone.models.reading import read
from netclone.reporting.png import draw
from netclone.runtime.bars import Bars
from netclone.runtime.writing import write_text

NAME = "digits"
"""Name of the clone."""

OLD, NEW = tuple(range(7)), (7, 8, 9)
"""The digits that the target knows, and those that it gets."""

SOURCE, TARGET = "test_efficientnet", "test_resnet"
"""timm's names of the two networks."""

LEAST_ACCURACY, MOST_LOST = 0.90, 0.03
"""The least accuracy of the grafted model over all ten digits, and the most that it may lose on 0 to 6."""

_FILES = ("grafted.png", "digits.safetensors", "results.json")


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 32, 32)`` with values in about [-1, 1], and labels ``(N,)``, of both splits."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def training(self, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Images and labels of some classes of the training split."""
        chosen = torch.isin(self.labels, torch.tensor(classes))
        return self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Check:
    """A claim of the demo, whether it is true, and what was measured."""

    claim: str
    holds: bool
    seen: str


@dataclass(frozen=True)
class DemoResult:
    """Results of the demo: accuracies and costs by model, checked claims, and the written files."""

    seed: int
    scores: tuple[tuple[str, Scores], ...]
    costs: tuple[tuple[str, Cost], ...]
    checks: tuple[Check, ...]
    at: str
    source_at: str | None
    certificate: float
    kept: tuple[tuple[str, int, int], ...]
    search: tuple[Candidate, ...]
    picture: Path
    module: Path
    results: Path


def run(seed: int = 0, out: str | os.PathLike[str] = "netclone-demo", console: Console | None = None) -> DemoResult:
    """Clone the digits 7, 8 and 9 into a network that knows 0 to 6, and check every claim.

    It runs on one thread, so the same seed gives the same result on the same machine, except for latencies. The
    caller's random states and number of threads are restored.

    Parameters
    ----------
    seed
        Seed of both networks, their training and the clone. The split of the data is the same for every seed.
    out
        Folder for ``grafted.png``, ``digits.safetensors`` and ``results.json``, created if necessary. The files appear
        together, at the end.
    console
        Where to show progress. None: nowhere.

    Raises
    ------
    NetcloneError
        If a claim is not true; the message says what was measured, and nothing is written.
    ArgumentError
        If ``out`` cannot be written to, or ``seed`` is negative.

    Reference: Partial Network Cloning (arXiv 2303.10597), section 4.
    """
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed: got {seed}, expected an integer from 0 to 2**63 - 1")
    console = console or Console(quiet=True)
    with _written_whole(Path(out), _FILES) as staging, _one_thread(), Bars(console) as bars:
        digits = load_data()
        source = make_network(SOURCE, 10, seed)
        train_network(source, digits.images, digits.labels, seed, epochs=6, progress=bars.named("train source on 0-9"))
        target = make_network(TARGET, len(OLD), seed)
        old = digits.training(OLD)
        train_network(target, *old, seed, epochs=5, progress=bars.named("train target on 0-6"))
        bits = _state(target)
        traced = trace(target, digits.images[:2])

        module = clone(
            source,
            target,
            [digits.training(NEW)],
            classes=NEW,
            class_names=[str(digit) for digit in NEW],
            target_data=[old],
            epochs=16,
            seed=seed,
            progress=bars.tell,
        )
        done = bars.named("inject, evaluate, save, load, remove")
        grafted = inject(target, module, name=NAME)
        save(module, staging / "digits.safetensors")
        loaded = inject(target, load(staging / "digits.safetensors"), name=NAME)
        removed = remove(grafted, NAME)
        done(1, 4)
        test = [(digits.test_images, digits.test_labels)]
        scores = {
            "target": evaluate(target, test, old=OLD, new=NEW),
            "grafted": evaluate(grafted, test, reference=target),
            "removed": evaluate(removed, test, old=OLD, new=NEW),
            "source": evaluate(source, test, old=OLD, new=NEW),
        }
        done(2, 4)
        costs = measure_costs(source, target, grafted, module, digits.images[:1])
        done(3, 4)
        checks = (
            *_check_scores(scores["target"], scores["grafted"]),
            *_check_bits(target, bits, traced, grafted, loaded, removed, digits.test_images),
            *_check_costs(costs["source"], costs["module"]),
        )
        if wrong := [check for check in checks if not check.holds]:
            raise NetcloneError(
                f"demo, seed {seed}: not true: " + "; ".join(f"{check.claim} ({check.seen})" for check in wrong)
            )
        draw(grafted, NAME, staging / "grafted.png")
        picture, archive, results = (Path(out) / file for file in _FILES)
        result = DemoResult(
            seed=seed,
            scores=tuple(scores.items()),
            costs=tuple(costs.items()),
            checks=checks,
            at=str(module.at),
            source_at=module.source_at,
            certificate=module.certificate,
            kept=module.spec.kept,
            search=module.spec.search,
            picture=picture,
            module=archive,
            results=results,
        )
        write_text(staging / "results.json", json.dumps(as_data(result, out), indent=2) + "\n")
        done(4, 4)
    return result


FOLDERS = ("digits", "source", "target")
"""What :func:`lay_out` leaves: images by class, and two networks as timm's ``save_for_hf`` writes them."""

_PREPARED = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@dataclass(frozen=True)
class LaidOut:
    """What :func:`lay_out` left: the folder, and how many images are in each of its folders of classes."""

    folder: Path
    images: dict[str, int]


def lay_out(seed: int = 0, out: str | os.PathLike[str] = ".", console: Console | None = None) -> LaidOut:
    """Leave digits as images in folders by class, and two trained networks, to try the command line on.

    ``digits/train`` and ``digits/test`` have the folders ``old``, with the digits 0 to 6, and ``new``, with 7 to 9. The
    network in ``target`` knows the old ones, and that in ``source`` all ten. The result depends on the seed alone.

    Parameters
    ----------
    seed
        Seed of both networks and their training.
    out
        The folder to leave them in, created if necessary. They appear together, at the end.
    console
        Where to show progress. None: nowhere.

    Raises
    ------
    ArgumentError
        If something of that name is there already, ``out`` cannot be written to, or ``seed`` is negative.
    """
    folder = Path(out)
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed: got {seed}, expected an integer from 0 to 2**63 - 1")
    if there := [name for name in FOLDERS if (folder / name).exists()]:
        raise ArgumentError(f"folders: there is a '{there[0]}' in '{folder}' already; choose another folder")
    with _written_whole(folder, FOLDERS) as staging, _one_thread(), Bars(console or Console(quiet=True)) as bars:
        counts = _draw_digits(staging / "digits")
        for role, name, kinds in (("source", SOURCE, ("old", "new")), ("target", TARGET, ("old",))):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                classes = len(OLD) + len(NEW) * (len(kinds) > 1)
                network = timm.create_model(name, num_classes=classes, pretrained_cfg_overlay=dict(_PREPARED))
            images, labels = _read_digits([staging / "digits" / "train" / kind for kind in kinds], network)
            train_network(network, images, labels, seed, epochs=4, progress=bars.named(f"train the {role}"))
            save_for_hf(network, str(staging / role), safe_serialization=True)
    return LaidOut(folder, counts)


def _draw_digits(folder: Path) -> dict[str, int]:
    """Every other of scikit-learn's digits as an image; every fourth of these is for testing."""
    digits, counts = load_digits(), Counter[str]()
    for number, (pixels, label) in enumerate(zip(digits.images[::2], digits.target[::2], strict=True)):
        part = f"{'test' if number % 4 == 0 else 'train'}/{'old' if label in OLD else 'new'}"
        of_class = folder / part / str(label)
        of_class.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9).astype("uint8")).resize((32, 32), Image.Resampling.BILINEAR)
        image.convert("RGB").save(of_class / f"{number}.png")
        counts[f"digits/{part}"] += 1
    return dict(counts)


def _read_digits(folders: Sequence[Path], network: nn.Module) -> tuple[Tensor, Tensor]:
    """All images of some folders as a network takes them, and the digits that they show."""
    images, labels = [], []
    for folder in folders:
        pictures = read(str(folder), preparation(network).transform(), "train", "digits")
        for batch, numbers in pictures:
            images.append(batch)
            labels.append(torch.tensor([int(pictures.names[number]) for number in numbers.tolist()]))
    return torch.cat(images), torch.cat(labels)


def load_data() -> Digits:
    """scikit-learn's 1797 handwritten digits, enlarged from 8 x 8 to 32 x 32, in a fixed, stratified split.

    Examples
    --------
    >>> digits = load_data()
    >>> digits.images.shape, digits.test_images.shape
    (torch.Size([1347, 1, 32, 32]), torch.Size([450, 1, 32, 32]))
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=bunch.target, random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def make_network(name: str, classes: int, seed: int) -> nn.Module:
    """One of timm's networks for images of one channel, initialised from a seed; random states do not change."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = timm.create_model(name, in_chans=1, num_classes=classes)
    return model.eval()


def train_network(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
    *,
    epochs: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train a network in place on randomly shifted images, and leave it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(labels) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps, pct_start=0.25)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            loss = F.cross_entropy(model(shifted(images[batch], generator)), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, epochs)
    model.eval()


def shifted(images: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """Images ``(N, C, H, W)``, each shifted by up to ``most`` pixels; new pixels are -1.

    Examples
    --------
    >>> moved = shifted(torch.ones(5, 1, 8, 8), torch.Generator().manual_seed(0))
    >>> moved.shape, bool((moved.flatten(1).sum(1) >= 2 * 36 - 64).all())
    (torch.Size([5, 1, 8, 8]), True)
    """
    height, width = images.shape[2:]
    wide = F.pad(images, (most,) * 4, value=-1.0)
    moves = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(wide, moves, strict=True)])


def measure_costs(
    source: nn.Module, target: nn.Module, grafted: nn.Module, module: CloneModule, image: Tensor
) -> dict[str, Cost]:
    """Parameters, MACs and latency for one image ``(1, C, H, W)``; the module's for the features that it reads."""
    features = [torch.zeros(1, *shape) for shape in (module.spec.input_shape, module.spec.feature_shape) if shape]
    return {
        "target": cost(target, image),
        "grafted": cost(grafted, image),
        "module": cost(module, *features),
        "source": cost(source, image),
    }


def as_data(result: DemoResult, out: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``results.json``: plain data, without paths other than the caller's."""
    return {
        "command": f"netclone demo --seed {result.seed} --out {shlex.quote(os.fspath(out))}",
        "seed": result.seed,
        "versions": {
            "netclone": netclone.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
        "networks": {"target": TARGET, "source": SOURCE},
        "classes": {"old": list(OLD), "new": list(NEW)},
        "scores": {name: asdict(scores) for name, scores in result.scores},
        "costs": {name: asdict(costs) for name, costs in result.costs},
        "checks": [asdict(check) for check in result.checks],
        "clone": {
            "at": result.at,
            "source_at": result.source_at,
            "certificate": result.certificate,
            "kept": [list(group) for group in result.kept],
            "search": [asdict(candidate) for candidate in result.search],
        },
        "files": list(_FILES),
    }


# Claims


def _check_scores(before: Scores, grafted: Scores) -> tuple[Check, ...]:
    assert before.old is not None and grafted.old is not None
    lost = before.old - grafted.old
    return (
        Check(
            f"the grafted model knows at least {LEAST_ACCURACY:.0%} of all ten digits",
            grafted.all >= LEAST_ACCURACY,
            f"{grafted.all:.1%}",
        ),
        Check(
            f"it loses at most {100 * MOST_LOST:.0f} points on the target's own digits",
            lost <= MOST_LOST,
            f"{100 * lost:.1f} points: {before.old:.1%} before, {grafted.old:.1%} after",
        ),
    )


def _check_bits(
    target: nn.Module,
    bits: dict[str, Tensor],
    traced: fx.GraphModule,
    grafted: fx.GraphModule,
    loaded: fx.GraphModule,
    removed: fx.GraphModule,
    images: Tensor,
) -> tuple[Check, ...]:
    want, got = predict(target, images), predict(grafted, images)
    differ = int((want != got[:, : want.shape[1]]).sum())
    differences = _differences(traced, removed)
    now = _state(target)
    moved = [name for name in bits if name not in now or not same_bits(bits[name], now[name])]
    return (
        Check(
            "old-class logits are bitwise equal to the target's",
            differ == 0,
            f"{want.numel()} compared, {differ} differ",
        ),
        Check(
            "a saved and loaded module gives the same bits",
            same_bits(predict(loaded, images), got),
            "all logits compared",
        ),
        Check(
            "removal leaves the target bit-identical",
            not differences,
            ", ".join(differences) or "code, state_dict keys and bits, flags compared",
        ),
        Check(
            "the target itself was never touched",
            not moved and now.keys() == bits.keys(),
            ", ".join(moved) or f"{len(bits)} tensors compared",
        ),
    )


def _check_costs(source: Cost, module: Cost) -> tuple[Check, ...]:
    return (
        Check(
            "the module is smaller than the source",
            module.parameters < source.parameters and module.macs < source.macs,
            f"{module.parameters:,} of {source.parameters:,} parameters, {module.macs:,} of {source.macs:,} MACs",
        ),
    )


def _differences(before: fx.GraphModule, after: fx.GraphModule) -> list[str]:
    """The differences of two graphs: code, names, bits, flags."""
    first, second = before.state_dict(), after.state_dict()
    found = []
    if before.code != after.code:
        found.append("the generated code differs")
    if list(first) != list(second):
        found.append("the state_dict's keys differ")
    elif names := [name for name in first if not same_bits(first[name], second[name])]:
        found.append(f"'{names[0]}' differs")
    if [(name, part.training) for name, part in before.named_modules()] != [
        (name, part.training) for name, part in after.named_modules()
    ]:
        found.append("modules or their training flags differ")
    if [(name, parameter.requires_grad) for name, parameter in before.named_parameters()] != [
        (name, parameter.requires_grad) for name, parameter in after.named_parameters()
    ]:
        found.append("parameters or their requires_grad differ")
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Surroundings


@contextmanager
def _written_whole(out: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder whose entries of these names move to ``out`` at the end; after a failure, ``out`` is unchanged."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".netclone-", dir=out))
    except OSError as error:
        raise ArgumentError(f"out: cannot write to '{out}': {error.strerror or error}") from error
    try:
        yield staging
        for file in names:
            os.replace(staging / file, out / file)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # something else has been put there meanwhile
                folder.rmdir()
        if isinstance(error, OSError):
            raise ArgumentError(f"out: cannot write to '{out}': {error.strerror or error}") from error
        raise
    staging.rmdir()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, since the order of sums depends on the number of threads; restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
