"""A grafted network is written and read in Python, whatever its target's constructor was told."""

import hashlib
import json

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from netclone import ArgumentError, clones, extract, inject, load_model, localize, remove, replace, save, save_grafted
from netclone.errors import ArchiveError, LoadError
from netclone.files.bundling import log_of
from netclone.graph.preparing import preparation
from netclone.graph.tracing import same_bits
from netclone.runtime.digests import content_digest

IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def module():
    source = timm.create_model("test_resnet", num_classes=9)
    return extract(source, localize(source, method="magnitude"), classes=[5, 7])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        pytest.param("test_efficientnet", {"pad_type": "same"}, marks=pytest.mark.long),
        ("test_vit", {"global_pool": "avg", "qk_norm": True, "class_token": False}),
        ("test_resnet", {"output_stride": 8, "act_layer": "gelu"}),
    ],
    ids=str,
)
def test_what_is_written_is_read_as_it_was(module, name, options, tmp_path):
    target = timm.create_model(name, num_classes=4, **options).eval()
    grafted = inject(inject(target, module, at="input", name="a"), module, at="input", name="b")
    save_grafted(grafted, tmp_path / "both.safetensors")
    found = load_model(str(tmp_path / "both.safetensors"))
    with torch.no_grad():
        assert same_bits(found(IMAGES), grafted(IMAGES))
        assert same_bits(remove(remove(found, "a"))(IMAGES), target(IMAGES))
    assert clones(found) == ("a", "b")


def test_its_log_goes_on_as_that_of_the_commands(module, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    path, of_clone = tmp_path / "grafted.safetensors", tmp_path / "a.safetensors"
    save(module, of_clone)
    digest = hashlib.sha256(of_clone.read_bytes()).hexdigest()
    target = timm.create_model("test_resnet", num_classes=4).eval()
    save_grafted(inject(inject(target, module, at="input", name="a"), module, at="input", name="b"), path, by="Ada L.")
    first = log_of(path)
    assert [(one.action, one.clone, one.by, one.sha256) for one in first] == [
        ("inject", "a", "Ada L.", digest),
        ("inject", "b", "Ada L.", digest),
    ]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    grafted = load_model(str(path))
    save_grafted(grafted, tmp_path / "again.safetensors")  # nothing was done
    assert log_of(tmp_path / "again.safetensors") == first
    replace(grafted, "b", module.with_bias(0.5))
    save_grafted(inject(remove(grafted, "a"), module, at="input", name="c"), path)
    assert log_of(path)[:2] == first
    assert [(one.date, one.action, one.clone, one.by) for one in log_of(path)[2:]] == [
        ("1970-01-02", "remove", "a", ""),
        ("1970-01-02", "remove", "b", ""),
        ("1970-01-02", "inject", "b", ""),
        ("1970-01-02", "inject", "c", ""),
    ]
    left = load_model(str(path))
    save_grafted(inject(remove(remove(left, "b")), module, at="input", name="d"), path)
    assert [(one.action, one.clone) for one in log_of(path)[6:]] == [("remove", "b"), ("remove", "c"), ("inject", "d")]
    with pytest.raises(ArgumentError, match="by: got"):
        save_grafted(left, tmp_path / "never.safetensors", by="two\nlines")
    assert not (tmp_path / "never.safetensors").exists()


def test_a_file_says_the_size_of_images_that_the_target_was_made_for(module, tmp_path):
    source = timm.create_model("test_resnet", num_classes=9)
    images = torch.randn(2, 3, 64, 64)
    module = extract(source, localize(source, method="magnitude"), classes=[5], example_inputs=images)
    target = timm.create_model("test_vit", num_classes=4, img_size=64).eval()  # timm's own word for it stays 160
    save_grafted(inject(target, module, at="input"), tmp_path / "small.safetensors")
    assert preparation(load_model(str(tmp_path / "small.safetensors"))).size == (3, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.long)])
def test_it_keeps_its_dtype(module, dtype, tmp_path):
    grafted = inject(timm.create_model("test_resnet", num_classes=4).eval(), module, at="input").to(dtype)
    grafted.meta["netclone"]["example"] = grafted.meta["netclone"]["example"].to(dtype)
    save_grafted(grafted, tmp_path / "cast.safetensors")
    found = load_model(str(tmp_path / "cast.safetensors"))
    with torch.no_grad():
        assert same_bits(found(IMAGES.to(dtype)), grafted(IMAGES.to(dtype)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::netclone.errors.LostInTrainingWarning")  # of its auxiliary heads
def test_a_network_that_does_not_say_its_architecture(module, tmp_path):
    target = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=3, aux_logits=True).eval()
    grafted = inject(target, module, at="input", example_inputs=IMAGES)
    with pytest.raises(ArgumentError, match="pass it, such as 'torchvision/resnet50'"):
        save_grafted(grafted, tmp_path / "x.safetensors")
    options = {"init_weights": False, "aux_logits": True}
    with pytest.raises(LoadError, match="missing, such as 'aux1"):
        save_grafted(grafted, tmp_path / "x.safetensors", architecture="torchvision/googlenet", options=options)
    other = {"architecture": "torchvision/googlenet", "options": options}
    save_grafted(grafted, tmp_path / "x.safetensors", target=target, **other)
    with torch.no_grad():
        assert same_bits(load_model(str(tmp_path / "x.safetensors"))(IMAGES), grafted(IMAGES))
    strange = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=3, aux_logits=True)
    with pytest.raises(ArgumentError, match="differs from that of the grafted network's target"):
        save_grafted(grafted, tmp_path / "y.safetensors", target=strange, **other)
    assert not (tmp_path / "y.safetensors").exists()


def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(module, tmp_path):
    target = timm.create_model("test_resnet", num_classes=4, act_layer=torch.nn.Hardswish).eval()
    grafted = inject(target, module, at="input")
    with pytest.raises(ArchiveError, match="options: 'act_layer' has an invalid value"):
        save_grafted(grafted, tmp_path / "x.safetensors")
    with pytest.raises(LoadError, match="is not what timm/test_resnet with the options {} computes"):
        save_grafted(grafted, tmp_path / "x.safetensors", options={})
    with pytest.raises(ArgumentError, match="holds no clones"):
        save_grafted(remove(grafted), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"channels": [4000] * 4}, {"layers": [4000] * 4}, {"stem_width": 90_000}], ids=["wide", "deep", "stem"]
)
def test_a_file_that_says_a_far_larger_network_is_not_built(module, options, tmp_path):
    path = tmp_path / "small.safetensors"
    save_grafted(inject(timm.create_model("test_resnet", num_classes=4).eval(), module, at="input"), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    key = next(key for key in metadata if "bundle" in key)
    facts = json.loads(metadata[key])
    tensors = safetensors.torch.load_file(path)
    facts = {name: value for name, value in facts.items() if name != "sha256"} | {"options": options}
    facts["sha256"] = content_digest(facts, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={key: json.dumps(facts)}))
    with pytest.raises((LoadError, ArchiveError), match="far larger than its|could not be built"):
        load_model(str(path))
