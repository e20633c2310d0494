"""netclone export: what is written for other runtimes computes what the network computes, or is not written."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from netclone import extract, inject, localize, save, trace
from netclone.cli import app
from netclone.errors import ArchiveError, ArgumentError, TraceError
from netclone.graph.tracing import same_bits
from netclone.workflows import translating
from netclone.workflows.translating import to_aoti, to_int8_onnx, to_onnx, to_openvino, to_pt2

pytestmark = pytest.mark.slow  # all of it rests on whole runs

NAMES = {"resnet": "test_resnet", "mobilenet": "mobilenetv3_small_050", "vit": "test_vit"}
PAIRS = (
    ("resnet", "mobilenet"),
    pytest.param(("mobilenet", "vit"), marks=pytest.mark.long),
    pytest.param(("vit", "resnet"), marks=pytest.mark.long),
)


def network(kind, classes):
    """One size of images for all, and a head that says something; larger ones are in examples/benchmarks."""
    torch.manual_seed(classes)
    size = {"img_size": 64} if kind == "vit" else {}
    model = timm.create_model(NAMES[kind], num_classes=classes, **size).eval()
    nn.init.normal_(model.get_classifier().weight, std=0.05)
    return model


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]} into {pair[1]}")
def grafted(request):
    source, target = network(request.param[0], 6), network(request.param[1], 5)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = localize(source, method="magnitude", keep=0.5, example_inputs=images)
    module = extract(source, mask, classes=[1, 4], example_inputs=images)
    return inject(trace(target, images), module, at="input", name="clone"), target.eval()


def images(count):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))


def test_onnx_computes_the_same_for_any_batch(grafted, tmp_path):
    model, _ = grafted
    done = to_onnx(model, tmp_path / "model.onnx")
    assert done.difference < 1e-4
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for count in (1, 2, 5):
        with torch.no_grad():
            want = model(images(count))
        got = torch.from_numpy(session.run(["logits"], {"images": images(count).numpy()})[0])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_an_exported_archive_computes_the_same_bits(grafted, tmp_path):
    model, _ = grafted
    assert to_pt2(model, tmp_path / "model.pt2").difference == 0
    back = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 2, 5):
        with torch.no_grad():
            assert same_bits(back(images(count)), model(images(count)))


def test_a_network_is_exported_in_eval_mode_and_left_in_its_own(tmp_path):
    model = timm.create_model("test_resnet", num_classes=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_pt2(model, tmp_path / "model.pt2")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(translating, "predict", lambda model, images: model(images).detach() + 1)
    with pytest.raises(TraceError, match=r"onnx: logits of the file differ by .* nothing was written"):
        to_onnx(timm.create_model("test_resnet", num_classes=4), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_fixes_its_batch_is_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, images):
            return (images + torch.ones(2, 1, 1, 1)).flatten(1)[:, :3]

    for write, name in ((to_onnx, "onnx"), (to_pt2, "pt2")):
        with pytest.raises(TraceError, match=f"to: {name}: "):
            write(Two(), tmp_path / "model", torch.randn(2, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_without_onnxscript_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ArgumentError, match=r"pip install 'netclone\[onnx\]'"):
        to_onnx(nn.Flatten(), tmp_path / "model.onnx", torch.randn(2, 3, 8, 8))


class Tiny(nn.Module):
    """Logits (N, 3) of images (N, 3, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, 3)

    def forward(self, images):
        return self.linear(self.conv(images).relu().mean((2, 3)))


def few(count=2):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def test_given_images_are_compared_on_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(translating, "predict", lambda model, images: (seen.append(images), model(images).detach())[1])
    to_pt2(Tiny(), tmp_path / "model.pt2", few(), few(11))
    assert [len(images) for images in seen] == [1, 3, 8, 3] and torch.equal(torch.cat(seen[2:]), few(11))


# AOTInductor


@pytest.mark.long  # the compiler takes its time
def test_a_compiled_package_computes_the_same_for_any_batch(tmp_path):
    model = Tiny().train()
    done = to_aoti(model, tmp_path / "model.pt2", few(), few(11))
    assert done.difference < 1e-5 and done.bytes == (tmp_path / "model.pt2").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"] and model.training
    run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    for count in (1, 2, 5):
        with torch.no_grad():
            torch.testing.assert_close(run(few(count)), model(few(count)), rtol=0, atol=1e-5)


def test_without_a_compiler_it_says_what_is_missing(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(
        ArgumentError, match=r"aoti needs a C\+\+ compiler, and torch finds none: install g\+\+ or clang"
    ):
        to_aoti(Tiny(), tmp_path / "model.pt2", few())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("write", "suffix"), [(to_aoti, ".pt2"), (to_openvino, ".xml")])
def test_a_name_that_the_runtime_would_not_read_is_refused(write, suffix, tmp_path):
    with pytest.raises(ArgumentError, match=f"out: got 'model.bin', expected a name that ends in '{suffix}': "):
        write(Tiny(), tmp_path / "model.bin", few())


# OpenVINO. It is no part of the test extra: what stands for it here writes two files and runs the exported program.


def stand_in(computed=lambda logits: logits):
    named = SimpleNamespace(get_tensor=lambda: SimpleNamespace(set_names=lambda names: None))

    def convert(program):
        return SimpleNamespace(program=program, reshape=lambda shape: None, inputs=[named], outputs=[named])

    def store(converted, file, compress_to_fp16):
        assert compress_to_fp16 is False
        stored[str(file)] = converted.program.module()
        Path(file).write_text("graph")
        Path(file).with_suffix(".bin").write_text("weights")

    def load(file, device, options):
        assert (device, options) == ("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: {"logits": computed(stored[str(file)](torch.from_numpy(images)).detach()).numpy()}

    stored = {}
    core = SimpleNamespace(compile_model=load)
    return SimpleNamespace(convert_model=convert, save_model=store, Core=lambda: core)


def test_both_files_of_openvino_are_written_once_they_compute_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", stand_in())
    done = to_openvino(Tiny(), tmp_path / "model.xml", few(), few(11))
    assert done.difference == 0 and done.bytes == len("graph") + len("weights")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.xml": "graph",
        "model.bin": "weights",
    }


def test_neither_file_of_openvino_is_written_if_it_computes_something_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", stand_in(lambda logits: logits + 1))
    with pytest.raises(TraceError, match=r"to: openvino: logits of the file differ by .*; nothing was written"):
        to_openvino(Tiny(), tmp_path / "model.xml", few())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("old", [None, "old weights"])
def test_if_one_file_of_openvino_cannot_be_written_the_other_stays(old, tmp_path, monkeypatch):
    if old is not None:
        (tmp_path / "model.bin").write_text(old)
    write = translating.write_file

    def failing(path, content):
        if path.suffix == ".xml":
            raise ArchiveError("no room")
        write(path, content)

    monkeypatch.setitem(sys.modules, "openvino", stand_in())
    monkeypatch.setattr(translating, "write_file", failing)
    with pytest.raises(ArchiveError, match="no room"):
        to_openvino(Tiny(), tmp_path / "model.xml", few())
    assert [path.read_text() for path in tmp_path.iterdir()] == ([] if old is None else [old])


def test_without_openvino_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ArgumentError, match=r"openvino needs openvino, .*: pip install 'netclone\[openvino\]'"):
        to_openvino(Tiny(), tmp_path / "model.xml", few())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_before_the_work(tmp_path):
    with pytest.raises(ArchiveError, match="there is no folder"):
        to_onnx(nn.Flatten(), tmp_path / "none" / "model.onnx", torch.randn(2, 3, 8, 8))


def test_the_command_writes_a_grafted_file_and_says_what_was_checked(tmp_path):
    runner = CliRunner()
    source = timm.create_model("test_resnet", num_classes=6)
    module = extract(source, localize(source, method="magnitude", keep=0.5), classes=[1, 4])
    save(module.with_spec(at="input"), tmp_path / "clone.safetensors")
    torch.manual_seed(0)
    target = timm.create_model("test_resnet", num_classes=4)
    save_file(target.state_dict(), tmp_path / "target.safetensors")
    grafted = str(tmp_path / "grafted.safetensors")
    name = f"timm/test_resnet@{tmp_path / 'target.safetensors'}"
    assert runner.invoke(app, ["inject", name, str(tmp_path / "clone.safetensors"), "--out", grafted]).exit_code == 0
    out = tmp_path / "model.onnx"
    result = runner.invoke(app, ["export", grafted, "--to", "onnx", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["bytes"] == out.stat().st_size
    assert facts["difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(out))
    assert session.get_outputs()[0].shape[1] == 6
    result = runner.invoke(app, ["export", grafted, "--to", "pt2", "--out", str(tmp_path / "model.pt2")])
    assert result.exit_code == 0, result.output
    assert "differ by 0.0e+00" in result.output


# int8


def test_int8_is_a_third_of_the_bytes_and_says_what_it_changed(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=6).eval()
    whole, some = to_onnx(model, tmp_path / "whole.onnx", images(2)), torch.randn(24, 3, 64, 64)
    before = torch.get_rng_state(), logging.root.manager.disable
    small = to_int8_onnx(model, tmp_path / "small.onnx", some)
    assert torch.equal(before[0], torch.get_rng_state()) and logging.root.manager.disable == before[1]
    assert small.bytes == (tmp_path / "small.onnx").stat().st_size <= whole.bytes / 3
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(["logits"], {"images": some[1::2].numpy()})[0])
    with torch.no_grad():
        want = model(some[1::2])
    assert small.difference == pytest.approx(float((got - want).abs().max() / want.abs().max()), rel=1e-3)
    assert small.agreement == float((got.argmax(1) == want.argmax(1)).float().mean())
    assert 0 < small.difference < 0.2


def test_int8_needs_images_to_calibrate_and_to_measure(tmp_path):
    model = timm.create_model("test_resnet", num_classes=6).eval()
    with pytest.raises(ArgumentError, match="images: got 1, expected some to calibrate with and some to measure on"):
        to_int8_onnx(model, tmp_path / "small.onnx", torch.randn(1, 3, 160, 160))
    assert not list(tmp_path.iterdir())


def test_the_command_calibrates_with_a_folder(tmp_path):
    for index in range(8):
        folder = tmp_path / "images" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    asked = [
        "export",
        f"timm/test_resnet@{tmp_path / 'weights.pth'}",
        "--to",
        "onnx",
        "--out",
        str(tmp_path / "m.onnx"),
    ]
    result = CliRunner().invoke(app, [*asked, "--int8", "--data", str(tmp_path / "images"), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert 0 <= facts["agreement"] <= 1 and facts["bytes"] == (tmp_path / "m.onnx").stat().st_size
    for wrong in (["--int8"], ["--int8", "--data", str(tmp_path / "images"), "--to", "pt2"]):
        result = CliRunner().invoke(app, [*asked, *wrong])
        assert result.exit_code == 1 and "--int8 goes with --to onnx and with --data" in result.stderr
    result = CliRunner().invoke(app, [*asked, "--data", str(tmp_path / "images"), "--json"])
    assert result.exit_code == 0 and "agreement" not in json.loads(result.stdout)


@pytest.mark.parametrize(
    ("to", "out", "message"),
    [
        ("openvino", "model.onnx", "expected a name that ends in '.xml'"),
        ("aoti", "model.bin", "expected a name that ends in '.pt2'"),
        ("onnx", "nowhere/model.onnx", "nowhere"),
    ],
)
def test_the_command_refuses_a_file_before_it_loads_the_network(to, out, message, tmp_path, monkeypatch):
    def load(*args, **options):
        pytest.fail("the network was loaded")

    monkeypatch.setattr("netclone.models.loading.load_model", load)
    result = CliRunner().invoke(app, ["export", "timm/test_resnet", "--to", to, "--out", str(tmp_path / out)])
    assert result.exit_code == 1 and message in "".join(result.stderr.split("\n")), result.stderr
