"""Networks: the sources and targets of a suite, trained here, loaded from a folder, or with given weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from netclone.benchmarking.networks import train_network
from netclone.benchmarking.suites import Dataset, Network, Suite, needed
from netclone.graph.timing import clock_of_work
from netclone.metrics.evaluating import predict
from netclone.runtime.digests import content_digest
from netclone.runtime.writing import write_file

Tell = Callable[[str, int, int], None]


class Networks:
    """The sources and targets of a suite by seed; ``facts`` describes each, with its time of training."""

    def __init__(self, suite: Suite, dataset: Dataset, folder: Path, cache: Path, tell: Tell) -> None:
        self.suite, self.dataset, self.folder, self.cache, self.tell = suite, dataset, folder, cache, tell
        self.facts: dict[str, dict[str, Any]] = {}
        self.data_digest = hashed(
            *(
                str(x.shape) + hashlib.sha256(_some(x).numpy().tobytes()).hexdigest()
                for x in (dataset.images, dataset.labels, dataset.test_images, dataset.test_labels)
            )
        )
        self._built: dict[tuple[str, int], nn.Module] = {}
        self._logits: dict[int, Tensor] = {}
        self._digests: dict[str, str] = {}

    def source(self, seed: int) -> nn.Module:
        """The network that knows the new classes, and mostly the old ones, too."""
        return self._network("source", self.suite.source, seed, self.suite.source_knows)

    def columns(self, role: str) -> tuple[int, ...]:
        """The column of each label in the logits of the source or of the joint network; -1 for one it does not know."""
        knows, own = self.suite.source_knows, self.dataset.columns
        labels = range(len(own))
        if knows is None:
            return own
        return tuple(labels) if role == "joint" else tuple(knows.index(n) if n in knows else -1 for n in labels)

    def joint(self, seed: int) -> nn.Module:
        """A network that knows all classes: the source, or, where that knows a part, one trained in the same way."""
        if self.suite.source_knows is None:
            return self.source(seed)
        return self._network("joint", self.suite.source, seed, None)

    def target(self, seed: int) -> nn.Module:
        """The network that knows the old classes."""
        return self._network("target", self.suite.target, seed, self.suite.old)

    def target_logits(self, seed: int) -> Tensor:
        """The target's logits for all test images, with which every run of a seed is compared."""
        if seed not in self._logits:
            self._logits[seed] = predict(self.target(seed), self.dataset.test_images)
        return self._logits[seed]

    def depend_on(self) -> list[str]:
        """All that the networks depend on: data, training and given weights."""
        both = (self.suite.source, self.suite.target)
        weights = [self._weights_digest(network) for network in both]
        return [self.data_digest, *map(described, both), *weights, *self._elsewhere]

    @property
    def device(self) -> torch.device:
        """Where the images are: networks are there, too."""
        return self.dataset.images.device

    @property
    def _elsewhere(self) -> list[str]:
        """What figures depend on beside all that, if they are not made on the CPU."""
        return [] if self.device.type == "cpu" else [self.device.type]

    def _network(self, role: str, network: Network, seed: int, classes: tuple[int, ...] | None) -> nn.Module:
        """A network with given weights, or trained ones from the cache, or trained now."""
        if (role, seed) not in self._built:
            if network.read is not None:
                model, about = self._read(network, classes)
            elif network.weights is not None:
                model, about = self._given(network, network.weights, seed)
            else:
                model, about = self._trained(role, network, seed, classes)
            about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
            self._built[role, seed], self.facts[f"{role}, seed {seed}"] = model.to(self.device).eval(), about
        return self._built[role, seed]

    def _given(self, network: Network, file: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        weights = load_file(needed(self.folder, file))
        model = network.build(max(1, _rows(weights)), seed)
        model.load_state_dict(weights)
        return model, {"name": network.name, "weights": file, "seconds": None}

    def _read(self, network: Network, classes: tuple[int, ...] | None) -> tuple[nn.Module, dict[str, Any]]:
        assert network.read is not None
        columns = self.dataset.columns
        model = network.read(columns if classes is None else tuple(columns[label] for label in classes))
        return model, {"name": network.name, "weights": network.weights, "seconds": None}

    def _weights_digest(self, network: Network) -> str:
        """A digest of a network's given weights; empty for one that is trained here."""
        if network.read is not None:
            if network.name not in self._digests:
                self._digests[network.name] = content_digest(network.weights, network.read((0,)).state_dict())
            return self._digests[network.name]
        if network.weights is None:
            return ""
        return hashlib.sha256(needed(self.folder, network.weights).read_bytes()).hexdigest()

    def _trained(
        self, role: str, network: Network, seed: int, classes: tuple[int, ...] | None
    ) -> tuple[nn.Module, dict[str, Any]]:
        assert network.training is not None
        labels, augment = self.dataset.labels, self.suite.augment
        known = tuple(range(len(self.dataset.columns))) if classes is None else classes
        model = network.build(len(known), seed)
        made_of = (described(network), getattr(augment, "__name__", ""), str(seed), str(known), self.data_digest)
        key = hashed(*made_of, torch.__version__, *self._elsewhere)
        path = self.cache / f"{self.suite.networks or self.suite.name}-{role}-seed{seed}-{key[:16]}.safetensors"
        seconds = _cached(path, model)
        if seconds is None:
            index = find(labels, known)
            now = clock_of_work(self.device)
            started = now()
            train_network(
                model.to(self.device),
                self.dataset.images[index],
                renamed(labels[index], known),
                network.training,
                seed,
                augment=augment,
                progress=lambda done, total: self.tell(f"train the {role}, seed {seed}", done, total),
            )
            seconds = now() - started
            state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
            write_file(path, save(state, metadata={"seconds": repr(seconds)}))
        return model, {"name": network.name, "training": asdict(network.training), "seconds": seconds}


def _some(samples: Tensor) -> Tensor:
    """About five hundred of the samples, on the CPU."""
    return samples[:: max(1, len(samples) // 500)].cpu().contiguous()


def find(labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    """Indices of the samples of some classes."""
    return torch.isin(labels, torch.tensor(classes, device=labels.device)).nonzero().flatten()


def renamed(labels: Tensor, known: tuple[int, ...]) -> Tensor:
    """Labels as positions in ``known``."""
    place = torch.full((max(known) + 1,), -1, device=labels.device)
    place[list(known)] = torch.arange(len(known), device=labels.device)
    return place[labels]


def described(network: Network) -> str:
    """A network, and the origin of its weights."""
    how = network.weights if network.training is None else asdict(network.training)
    return f"{network.name}: {how}"


def hashed(*parts: str) -> str:
    """A digest of texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _rows(weights: dict[str, Tensor]) -> int:
    """The number of classes: the rows of the last matrix."""
    return [len(tensor) for tensor in weights.values() if tensor.dim() == 2][-1]


def _cached(path: Path, model: nn.Module) -> float | None:
    """Load a trained network, with the time of its training; None if its files are missing or incomplete."""
    try:
        with safe_open(path, "pt") as file:
            seconds = float(file.metadata()["seconds"])
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        return None
    return seconds
