"""A clone fitted again from what its classifier and adapter read, without the pictures."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import netclone
from netclone.errors import ArgumentError, TargetError
from netclone.learning import choosing

SIZE = 16
CLASSES = [4, 1]
POSITIONS = ["input", "stage1"]


class Network(nn.Module):
    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU())
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))
        return out


def samples(classes: int, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randn(count, 3, SIZE, SIZE, generator=generator) + labels.view(-1, 1, 1, 1)
    return [(images, labels)]


NEW, OLD = samples(5, 60), samples(3, 30, 1)
options = {"method": "magnitude", "epochs": 2, "distill_steps": 0}
latents = partial(netclone.latents, target_data=OLD)


@pytest.fixture(scope="module")
def target() -> nn.Module:
    torch.manual_seed(0)
    return Network(3).eval()


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(1)
    return Network(5).eval()


@pytest.fixture(scope="module")
def modules(source: nn.Module, target: nn.Module) -> dict[str, netclone.CloneModule]:
    """A clone for each position, fitted for a seed that no test takes."""
    return {
        at: netclone.clone(source, target, NEW, classes=CLASSES, target_data=OLD, at=at, seed=9, **options)  # type: ignore[arg-type]
        for at in POSITIONS
    }


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "STEPS", 10)


def differing(a: netclone.CloneModule, b: netclone.CloneModule) -> set[str]:
    """The parts of which a tensor differs in any bit."""
    return {part for part, own in a.parts.items() for name in own if not torch.equal(own[name], b.parts[part][name])}


@pytest.mark.parametrize("at", POSITIONS)
def test_a_refit_from_a_file_is_that_from_the_images_to_the_bit(
    at: str, modules: dict[str, netclone.CloneModule], target: nn.Module, tmp_path: Path
) -> None:
    module = modules[at]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    kept = latents(module, target, NEW)
    kept.save(tmp_path / "kept.safetensors")
    read = netclone.Latents.load(tmp_path / "kept.safetensors")
    assert (read.spec, read.body) == (kept.spec, kept.body)
    state = torch.get_rng_state()
    images, file = (netclone.refit(module, given, epochs=3, seed=4) for given in (kept, read))
    assert torch.equal(state, torch.get_rng_state())
    assert not differing(images, file) and images.spec == file.spec
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    changed = {"classifier"} if at == "input" else {"adapter", "classifier"}
    assert differing(images, module) == changed
    assert images.body.code == module.body.code
    assert dict(images.spec.recipe)["refit"].startswith('{"seed": 4')


def test_at_the_input_a_refit_finds_what_clone_found(source: nn.Module, target: nn.Module) -> None:
    """To rounding: the features were computed in other batches."""
    module = netclone.clone(source, target, NEW, classes=CLASSES, target_data=OLD, at="input", seed=3, **options)  # type: ignore[arg-type]
    again = netclone.refit(module, latents(module, target, NEW), seed=3)
    assert dict(module.spec.scores).keys() == dict(again.spec.scores).keys()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::netclone.NetcloneWarning")
@pytest.mark.parametrize("at", POSITIONS)
def test_one_sample_of_a_class_is_enough(at: str, modules: dict[str, netclone.CloneModule], target: nn.Module) -> None:
    few = netclone.latents(modules[at], target, [(NEW[0][0][:5], NEW[0][1][:5])], target_data=OLD)
    assert netclone.refit(modules[at], few, epochs=1).classes == tuple(CLASSES)


def test_what_is_kept_is_what_adapter_or_classifier_read(
    modules: dict[str, netclone.CloneModule], target: nn.Module
) -> None:
    inside, outside = (latents(modules[at], target, NEW) for at in ("stage1", "input"))
    images = torch.cat([OLD[0][0], NEW[0][0][torch.isin(NEW[0][1], torch.tensor(CLASSES))]])
    with torch.no_grad():
        torch.testing.assert_close(inside.features, target.stage1(target.stem(images)))
        torch.testing.assert_close(inside.logits, target(images))
    assert outside.features.dim() == 2 and len(outside) == len(images)
    named = NEW[0][1][torch.isin(NEW[0][1], torch.tensor(CLASSES))]
    assert inside.labels.tolist() == OLD[0][1].tolist() + [3 + CLASSES.index(label) for label in named.tolist()]
    assert (inside.body == "") and outside.body


def test_a_refitted_clone_is_grafted_saved_and_read_as_any(
    modules: dict[str, netclone.CloneModule], target: nn.Module, tmp_path: Path
) -> None:
    module = netclone.refit(modules["stage1"], latents(modules["stage1"], target, NEW), epochs=1)
    netclone.save(module, tmp_path / "clone.safetensors")
    read = netclone.load(tmp_path / "clone.safetensors")
    assert not differing(module, read) and read.spec == module.spec
    grafted = netclone.inject(target, read, name="new")
    assert torch.equal(grafted(NEW[0][0])[:, :3], target(NEW[0][0]))
    again = netclone.refit(read, latents(read, grafted, NEW), epochs=1)  # the clone in the target plays no part
    assert not differing(again, netclone.refit(module, latents(module, target, NEW), epochs=1))


def test_bf16_halves_the_features_and_nearly_gives_the_same_fit(
    modules: dict[str, netclone.CloneModule], target: nn.Module, tmp_path: Path
) -> None:
    module = modules["stage1"]
    kept = latents(module, target, NEW)
    for dtype in (None, "bf16"):
        kept.save(tmp_path / str(dtype), dtype)  # type: ignore[arg-type]
    sizes = [(tmp_path / str(dtype)).stat().st_size for dtype in (None, "bf16")]
    assert sizes[0] - sizes[1] == kept.features.numel() * 2
    read = netclone.Latents.load(tmp_path / "bf16")
    assert read.features.dtype == torch.float32 and torch.equal(read.logits, kept.logits)
    fits = [netclone.refit(module, given, epochs=2) for given in (kept, read)]
    for name, tensor in fits[0].state_dict().items():
        torch.testing.assert_close(fits[1].state_dict()[name], tensor, rtol=0.05, atol=0.05)


def test_two_sets_are_one(modules: dict[str, netclone.CloneModule], target: nn.Module) -> None:
    """Old pictures that are gone, and new ones: as if all had been there."""
    module = modules["stage1"]
    parts = [latents(module, target, NEW), netclone.latents(module, target, samples(5, 20, 7))]
    both = parts[0] + parts[1]
    assert len(both) == len(parts[0]) + len(parts[1])
    assert torch.equal(both.features[-3:], parts[1].features[-3:])
    assert netclone.refit(module, both, epochs=1).scores


def test_latents_of_something_else_are_refused(modules: dict[str, netclone.CloneModule], target: nn.Module) -> None:
    kept = latents(modules["input"], target, NEW)
    with pytest.raises(ArgumentError, match="clone with at 'input', here 'stage1'"):
        netclone.refit(modules["stage1"], kept)
    with pytest.raises(ArgumentError, match=r"with classes \(4,\), here \(4, 1\)"):
        netclone.refit(modules["input"], replace(kept, spec=replace(kept.spec, classes=(4,))))
    other = copy.deepcopy(modules["input"])
    next(iter(other.parts["source"].values())).data *= 2
    with pytest.raises(ArgumentError, match="another body"):
        netclone.refit(other, kept)
    with pytest.raises(ArgumentError, match="another body"):
        kept + replace(kept, body="")
    torch.manual_seed(5)
    with pytest.raises(TargetError, match="not those that the clone was fitted to"):
        latents(modules["stage1"], Network(3).eval(), NEW)
    with pytest.raises(ArgumentError, match="only extracted"):
        latents(modules["input"].with_spec(feature_shape=None), target, NEW)
    for wrong in ({"validation": 1.0}, {"epochs": -1}, {"batch_size": 0}):
        with pytest.raises(ArgumentError, match=next(iter(wrong))):
            netclone.refit(modules["input"], kept, **wrong)  # type: ignore[arg-type]
