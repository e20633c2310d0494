"""Weights stored in fewer bits: how large the file is, how far it is off, and what a damaged one does."""

import json

import pytest
import safetensors
import timm
import torch

import netclone
from netclone.errors import ArchiveError, ArgumentError
from netclone.files.archiving import read_header
from netclone.files.quantizing import dequantized, quantized


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    source = timm.create_model("resnet10t", num_classes=6).eval()
    mask = netclone.localize(source, method="magnitude", keep=0.5)
    return netclone.extract(source, mask, classes=[1, 4])


def test_a_row_is_off_by_half_a_step_of_its_own_scale_at_most():
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5).view(
        5, 1, 1, 1
    )
    stored, scale = quantized(weight)
    assert stored.dtype == torch.int8 and scale.shape == (5,)
    off = (dequantized(stored, scale, torch.float32) - weight).abs().flatten(1).amax(1)
    assert bool((off <= 0.5001 * weight.abs().flatten(1).amax(1) / 127).all())


@pytest.mark.parametrize(("dtype", "bytes_", "error"), [("bf16", 0.53, 0.02), ("int8", 0.28, 0.05)])
def test_a_file_is_as_small_as_it_says_and_names_its_error(module, tmp_path, dtype, bytes_, error):
    netclone.save(module, tmp_path / "whole.safetensors")
    netclone.save(module, tmp_path / "small.safetensors", dtype=dtype)
    whole, small = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "small"))
    assert small <= bytes_ * whole
    loaded = netclone.load(tmp_path / "small.safetensors")
    ((name, claimed),) = loaded.spec.stored
    assert name == dtype and 0 < claimed < error
    assert all(tensor.dtype == torch.float32 for tensor in loaded.parameters())
    images = torch.randn(16, 3, 176, 176, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, got = module(images), loaded(images)
    assert float((got - want).abs().max() / want.abs().max()) < 3 * claimed
    assert read_header(tmp_path / "small.safetensors").format_version == 3


def test_biases_and_statistics_keep_their_bits(module, tmp_path):
    netclone.save(module, tmp_path / "small.safetensors", dtype="int8")
    loaded, own = netclone.load(tmp_path / "small.safetensors").state_dict(), module.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[name], loaded[name]) for name in own if own[name].dim() < 2)


def test_what_is_read_from_fewer_bits_can_be_written_again_in_full(module, tmp_path):
    netclone.save(module, tmp_path / "small.safetensors", dtype="int8")
    once = netclone.load(tmp_path / "small.safetensors")
    netclone.save(once, tmp_path / "again.safetensors")
    twice = netclone.load(tmp_path / "again.safetensors")
    assert twice.spec == once.spec and twice.body.code == once.body.code
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True))


def test_without_dtype_the_file_is_what_older_versions_read(module, tmp_path):
    netclone.save(module, tmp_path / "whole.safetensors")
    with safetensors.safe_open(tmp_path / "whole.safetensors", "pt") as file:
        header = json.loads(file.metadata()["netclone"])
    assert header["format_version"] == 2
    assert "stored" not in header["spec"] and all("dtype" not in item for item in header["tensors"])


def test_another_word_is_refused(module, tmp_path):
    with pytest.raises(ArgumentError, match="dtype: got 'int4', expected one of 'bf16', 'int8'"):
        netclone.save(module, tmp_path / "x.safetensors", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused_for_int8(tmp_path):
    source = timm.create_model("test_resnet", num_classes=4)
    broken = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[1])
    with torch.no_grad():
        next(tensor for tensor in broken.parameters() if tensor.dim() == 4)[0, 0, 0, 0] = float("inf")
    with pytest.raises(ArchiveError, match="not finite"):
        netclone.save(broken, tmp_path / "x.safetensors", dtype="int8")


def _changed(path, change):
    """The file with something else in its table of tensors or header, as one would write it by hand."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    data = json.loads(table["__metadata__"]["netclone"])
    change(table, data)
    table["__metadata__"]["netclone"] = json.dumps(data)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _scale(table):
    return next(name for name in table if name.endswith(":scale"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda table, data: table.pop(_scale(table)), "the scale of tensor"),
        (lambda table, data: table[_scale(table)].update(dtype="I32"), "float32 scale"),
        (
            lambda table, data: table[_scale(table)].update(shape=[1, table[_scale(table)]["shape"][0]]),
            "each of its rows",
        ),
        (lambda table, data: data["tensors"][0].update(dtype="I64"), "cannot stand for"),
        (lambda table, data: data["tensors"][0].update(dtype="X8"), "unknown dtype"),
        (lambda table, data: data["spec"].update(stored=[["int8", -1.0]]), "an error of 0 or more"),
        (lambda table, data: data["spec"].update(stored=[["int8", 0.5]]), "the digest does not match"),
        (lambda table, data: data.update(format_version=2), "tensors 0"),
    ],
)
def test_a_file_that_was_changed_is_refused(module, tmp_path, change, why):
    path = tmp_path / "small.safetensors"
    netclone.save(module, path, dtype="int8")
    _changed(path, change)
    with pytest.raises(ArchiveError, match=why):
        netclone.load(path)


def test_a_scale_that_was_changed_is_refused(module, tmp_path):
    path = tmp_path / "small.safetensors"
    netclone.save(module, path, dtype="int8")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    content[start + table[_scale(table)]["data_offsets"][0]] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="the digest does not match"):
        netclone.load(path)
