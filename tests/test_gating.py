"""A clone with a gate: the images it is not sent keep the target's prediction, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from grafts import gated
from torch import Tensor, fx, nn

import netclone
from netclone.cloning.gating import before_logits
from netclone.cloning.modules import CloneModule
from netclone.cloning.verifying import compare
from netclone.errors import AdapterError, ArchiveError, ArgumentError
from netclone.files.archiving import read_header
from netclone.graph.modes import SPREAD
from netclone.graph.tracing import trace
from netclone.workflows.translating import to_int8_onnx, to_onnx, to_pt2

OLD, CLASSES = 5, (7, 8, 9)


def images(count: int = 6, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def target() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=OLD).eval()


@pytest.fixture(scope="module")
def module(target: nn.Module) -> CloneModule:
    """A clone inside the target that skips half of the old images; one at the input is in test_skipping.py."""
    torch.manual_seed(2)
    source = timm.create_model("test_efficientnet", num_classes=10)
    labels = torch.arange(40) % 10
    options = {"method": "magnitude", "budget": "channels", "epochs": 1, "distill_steps": 1}
    old = [(images(40), labels % OLD)]
    data = [(images(40, 4), labels)]
    return netclone.clone(source, target, data, classes=CLASSES, target_data=old, at="layer2", gate=0.5, **options)


@pytest.fixture(scope="module")
def grafted(target: nn.Module, module: CloneModule) -> fx.GraphModule:
    return netclone.inject(target, module, name="birds")


def shifted(model: fx.GraphModule, by: float) -> fx.GraphModule:
    """The same, with all scores of the router higher or lower."""
    model = copy.deepcopy(model)
    model.get_submodule("birds.router").bias += by
    return model


def sent(logits: Tensor) -> Tensor:
    return (logits[:, OLD:] > -torch.inf).all(1)


def test_some_images_are_sent_and_the_others_get_minus_infinity(grafted: fx.GraphModule, target: nn.Module) -> None:
    with torch.no_grad():
        got = grafted(images(20))
        assert 0 < int(sent(got).sum()) < 20
        assert bool((got[~sent(got)][:, OLD:] == -torch.inf).all())
        assert torch.equal(got[~sent(got)].argmax(1), target(images(20))[~sent(got)].argmax(1))


def test_old_logits_are_the_targets_bits_in_every_mode(grafted: fx.GraphModule, target: nn.Module) -> None:
    found = compare(grafted, target, images(), SPREAD)
    assert found.passed and len(found.equal) == len(SPREAD)


def test_what_is_sent_gets_the_logits_of_the_clone_without_a_gate(
    grafted: fx.GraphModule, target: nn.Module, module: CloneModule
) -> None:
    whole = netclone.inject(target, module.ungated())
    with torch.no_grad():
        got, want = grafted(images(20)), whole(images(20))
        torch.testing.assert_close(got[sent(got)], want[sent(got)])
        assert torch.equal(shifted(grafted, 1e6)(images(20)), want)  # all are sent: the very same call


def test_an_image_is_sent_or_not_whatever_else_is_in_the_batch(grafted: fx.GraphModule) -> None:
    with torch.no_grad():
        together = grafted(images(20))
        alone = torch.cat([grafted(one[None]) for one in images(20)])
    assert torch.equal(sent(together), sent(alone))
    torch.testing.assert_close(together, alone)


def test_the_branch_runs_on_what_is_sent_alone(grafted: fx.GraphModule) -> None:
    seen: list[int] = []
    model = copy.deepcopy(grafted)
    body = model.get_submodule("birds.body")
    body.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        count = int(sent(model(images(20))).sum())
        assert seen == [count]
        model.get_submodule("birds.router").bias -= 1e6
        assert not bool(sent(model(images(20))).any())
    assert seen == [count]


def test_removal_gives_the_target_back_bit_by_bit(grafted: fx.GraphModule, target: nn.Module) -> None:
    restored, traced = netclone.remove(grafted), trace(target, images(2))
    assert restored.code == traced.code
    assert list(restored.state_dict()) == list(traced.state_dict())
    assert all(map(torch.equal, restored.state_dict().values(), traced.state_dict().values()))
    with torch.no_grad():
        assert torch.equal(restored(images()), target(images()))


def test_a_file_keeps_the_gate_and_one_without_it_keeps_its_format(
    module: CloneModule, grafted: fx.GraphModule, target: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "birds.safetensors"
    netclone.save(module, path)
    back = netclone.load(path)
    assert read_header(path).format_version == 4
    assert back.spec == module.spec
    assert back.router is not None and module.router is not None
    assert torch.equal(back.router.weight, module.router.weight) and torch.equal(back.router.bias, module.router.bias)
    with torch.no_grad():
        assert torch.equal(netclone.inject(target, back)(images()), grafted(images()))
    netclone.save(module.ungated(), path)
    assert read_header(path).format_version == 2


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_router_is_stored_in_full(module: CloneModule, dtype: str, tmp_path: Path) -> None:
    netclone.save(module, tmp_path / "small.safetensors", dtype=dtype)
    back = netclone.load(tmp_path / "small.safetensors")
    assert back.spec == replace(module.spec, stored=back.spec.stored)
    assert back.router is not None and module.router is not None
    assert torch.equal(back.router.weight, module.router.weight)


def test_a_file_of_a_grafted_network_keeps_the_gate(grafted: fx.GraphModule, tmp_path: Path) -> None:
    netclone.save_grafted(grafted, tmp_path / "grafted.safetensors")
    back = netclone.load_model(str(tmp_path / "grafted.safetensors"))
    with torch.no_grad():
        assert torch.equal(back(images(20)), grafted(images(20)))


def test_a_gate_without_its_router_cannot_be_saved(module: CloneModule, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="router:weight"):
        netclone.save(CloneModule(module.body, module.spec), tmp_path / "birds.safetensors")
    assert module.spec.gate is not None
    other = replace(module.spec.gate, reads=(("global_pool_flatten", (7,)),))
    with pytest.raises(ArchiveError, match="a weight for each channel"):
        netclone.save(module.with_spec(gate=other), tmp_path / "birds.safetensors")
        netclone.load(tmp_path / "birds.safetensors")


def test_a_target_without_the_routers_features_is_refused(module: CloneModule, target: nn.Module) -> None:
    assert module.spec.gate is not None
    lost = module.with_spec(gate=replace(module.spec.gate, reads=(("nowhere", (96,)),)))
    with pytest.raises(AdapterError, match="router reads, module.spec.gate, is missing: no position 'nowhere'"):
        netclone.inject(target, lost)
    wrong = module.with_spec(gate=replace(module.spec.gate, reads=(("global_pool", (7,)),)))
    with pytest.raises(AdapterError, match=r"router takes \(N, 7\)"):
        netclone.inject(target, wrong)


def test_a_router_in_another_dtype_is_refused(module: CloneModule, target: nn.Module) -> None:
    other = copy.deepcopy(module)
    assert other.router is not None
    other.router.double()
    with pytest.raises(ArgumentError, match=r"its router's 'weight' is torch.float64 on cpu, .*module.to"):
        netclone.inject(target, other)
    netclone.inject(target, other.to("cpu", torch.float32))


def test_a_clone_that_is_fitted_again_keeps_its_gate(module: CloneModule, target: nn.Module) -> None:
    labels = torch.arange(40) % 10
    kept = netclone.latents(module, target, [(images(40, 4), labels)], target_data=[(images(40), labels % OLD)])
    again = netclone.refit(module, kept, epochs=1, seed=1)
    with torch.no_grad():
        one, two = (netclone.inject(target, clone)(images(20)) for clone in (module, again))
    assert again.spec.gate == module.spec.gate and torch.equal(sent(one), sent(two))


def test_the_router_reads_what_the_last_layer_reads(target: nn.Module) -> None:
    assert before_logits(trace(target, images(2))).name == "global_pool_flatten"
    assert before_logits(trace(nn.Sequential(nn.Conv2d(3, 4, 32), nn.Flatten()), images(2))).name == "_1"


@pytest.fixture(scope="module")
def sizes() -> tuple[fx.GraphModule, list[Tensor]]:
    """A small grafted network, and batches of which nothing, something or everything is sent."""
    model, shown, _ = gated()
    with torch.no_grad():
        passed = (model(shown)[:, 4:] > -torch.inf).all(1)
    left, seen = shown[~passed], shown[passed]
    return model, [left[:1], left[:3], seen[:1], seen[:3], torch.cat([left[:2], seen[:2]])]


def assert_computes(run: Callable[[Tensor], Tensor], model: fx.GraphModule, batches: list[Tensor]) -> None:
    """The same logits to rounding, and minus infinity in the same places."""
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(run(batch), model(batch))


def test_compiled_it_is_one_graph_that_skips_the_same_images(sizes: tuple[fx.GraphModule, list[Tensor]]) -> None:
    torch.compiler.reset()
    assert_computes(torch.compile(sizes[0], fullgraph=True, backend="aot_eager"), *sizes)
    torch.compiler.reset()


def test_exported_it_skips_the_same_images(sizes: tuple[fx.GraphModule, list[Tensor]], tmp_path: Path) -> None:
    model, batches = sizes
    done = to_pt2(model, tmp_path / "late.pt2", batches[-1])
    assert done.difference is not None and done.difference <= 1e-4
    assert_computes(torch.export.load(tmp_path / "late.pt2").module(), *sizes)


def test_in_onnx_it_skips_the_same_images(sizes: tuple[fx.GraphModule, list[Tensor]], tmp_path: Path) -> None:
    model, batches = sizes
    to_onnx(model, tmp_path / "late.onnx", batches[-1])
    session = onnxruntime.InferenceSession(tmp_path / "late.onnx", providers=["CPUExecutionProvider"])
    assert_computes(lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), *sizes)


def test_int8_is_refused(sizes: tuple[fx.GraphModule, list[Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="int8: a clone has a gate"):
        to_int8_onnx(sizes[0], tmp_path / "late.onnx", sizes[1][-1])
    assert not (tmp_path / "late.onnx").exists()


@pytest.mark.parametrize("gate", [0, 1, -0.5, "half"])
def test_a_share_out_of_range_is_refused(gate: object) -> None:
    with pytest.raises(ArgumentError, match=r"gate: got .* expected a share in \(0, 1\)"):
        netclone.Recipe(gate=gate)  # type: ignore[arg-type]


def test_a_gate_needs_samples_of_old_classes(target: nn.Module) -> None:
    source = timm.create_model("test_efficientnet", num_classes=10)
    with pytest.raises(ArgumentError, match="gate: .* pass some as target_data"):
        netclone.clone(source, target, [(images(20), torch.arange(20) % 10)], classes=CLASSES, gate=0.5)
