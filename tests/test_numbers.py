"""A clone belongs to the numbers it was fitted to: whatever way these come, they are known again, and no others are."""

import copy

import pytest
import timm
import torch
from torch import nn

import netclone
from netclone import CloneModule, TargetError, TargetWarning, clones, inject, load, remove, save, trace
from netclone.graph.numbers import numbers_digest
from netclone.graph.preparing import prepared_as

IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 6


class Normalised(nn.Module):
    """A network that prepares its images by buffers, one of which is computed anew by every constructor."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("grid", torch.ones(32), persistent=False)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body((x - self.mean) * self.grid).mean((2, 3)))


@pytest.fixture(scope="module")
def target() -> nn.Module:
    torch.manual_seed(0)
    return Normalised(4).eval()


@pytest.fixture(scope="module")
def module(target: nn.Module) -> CloneModule:
    torch.manual_seed(1)
    options = {"method": "magnitude", "at": "body", "epochs": 1, "distill_steps": 1, "keep": 0.9}
    old = [(IMAGES, LABELS % 4)]
    return netclone.clone(Normalised(6).eval(), target, [(IMAGES, LABELS)], classes=[2, 3], target_data=old, **options)


def changed(name: str, target: nn.Module) -> nn.Module:
    other = copy.deepcopy(target)
    with torch.no_grad():
        tensor = other.state_dict()[name].view(-1)
        tensor[-1] = torch.nextafter(tensor[-1], torch.tensor(9.0))
    return other


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda target: trace(target, IMAGES),
        lambda target: copy.deepcopy(target).to(memory_format=torch.channels_last),
        lambda target: copy.deepcopy(target).train(),
        lambda target: copy.deepcopy(target).requires_grad_(False),
    ],
    ids=["copy", "traced", "channels last", "train", "frozen"],
)
def test_the_same_numbers_are_known_in_whatever_way_they_come(target, module, way, share):
    assert clones(inject(way(target), module, share_parameters=share)) == ("clone",)


def test_what_no_logit_depends_on_does_not_count(target, module):
    other = copy.deepcopy(target)
    other.body[1].num_batches_tracked += 5
    inject(other, module)
    other.grid = torch.nextafter(other.grid, torch.zeros(32))  # as another machine would compute it
    inject(other, module)


def test_clones_that_are_there_already_do_not_count(target, module):
    grafted = inject(target, module)
    twice = inject(grafted, module)
    assert clones(remove(twice, "clone")) == ("clone_2",)
    inject(remove(twice, "clone"), module, name="again")
    assert numbers_digest(remove(grafted)) == dict(module.spec.target_digests)["float32"]


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "body.0.weight", "body.1.running_var", "mean"])
def test_one_last_bit_makes_another_target(target, module, name):
    other = changed(name, target)
    with pytest.raises(
        TargetError, match=r"another target: its weights were others .* allow_mismatch=True \(--force\)"
    ):
        inject(other, module)
    with pytest.raises(TargetError):
        inject(trace(other, IMAGES), module)
    with pytest.warns(TargetWarning, match="its weights were others"):
        grafted = inject(other, module, allow_mismatch=True)
    assert torch.equal(grafted(IMAGES)[:, :4], other(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_of_the_target_is_known_and_said(target, module, dtype):
    cast = copy.deepcopy(module).to(dtype)
    with pytest.warns(TargetWarning, match=f"in float32, and here the target is cast to {str(dtype)[6:]}"):
        inject(copy.deepcopy(target).to(dtype), cast)
    other = copy.deepcopy(target)
    with torch.no_grad():
        other.head.weight.mul_(1.5)
    with pytest.raises(TargetError, match=f"float32; here {str(dtype)[6:]}"):
        inject(other.to(dtype), cast)


def test_a_file_keeps_it_and_a_file_from_before_has_none(target, module, tmp_path):
    save(module, tmp_path / "clone.safetensors")
    found = load(tmp_path / "clone.safetensors")
    assert found.spec == module.spec
    with pytest.raises(TargetError):
        inject(changed("head.bias", target), found)
    inject(changed("head.bias", target), module.with_spec(target_digests=()))


def test_images_that_are_prepared_in_another_way_are_another_target(module):
    torch.manual_seed(2)
    source, target = (timm.create_model("test_resnet", num_classes=n).eval() for n in (6, 4))
    options = {"method": "magnitude", "at": "layer3", "epochs": 1, "distill_steps": 1, "keep": 0.9}
    old = [(IMAGES, LABELS % 4)]
    fitted = netclone.clone(source, target, [(IMAGES, LABELS)], classes=[2, 3], target_data=old, **options)
    assert fitted.spec.target_preparation.size == (3, 32, 32)
    inject(target, fitted)
    for images, why in (
        ({"mean": [0.1] * 3}, "the mean of its images"),
        ({"interpolation": "nearest"}, "interpolation"),
    ):
        other = copy.deepcopy(target)
        prepared_as(other, images)
        with pytest.raises(TargetError, match=why):
            inject(other, fitted)
        with pytest.warns(TargetWarning, match=why):
            inject(other, fitted, allow_mismatch=True)


def test_a_clone_that_was_only_extracted_goes_anywhere(target):
    mask = netclone.localize(Normalised(6).eval(), method="magnitude", example_inputs=IMAGES[:2])
    module = netclone.extract(Normalised(6).eval(), mask, classes=[1], example_inputs=IMAGES[:2])
    inject(target, module, at="input")
    inject(changed("mean", target), module, at="input")
