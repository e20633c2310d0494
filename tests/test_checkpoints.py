"""Checkpoints as people save them: whatever is around the tensors, they are found, or one line says why not."""

import argparse

import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from netclone.errors import LoadError, NetcloneWarning
from netclone.graph.preparing import preparation
from netclone.models.loading import load_model


def network(classes=3):
    return timm.create_model("test_resnet", num_classes=classes)


def read(content, folder, **options):
    torch.save(content, folder / "weights.ckpt")
    return load_model(f"timm/test_resnet@{folder / 'weights.ckpt'}", **options).state_dict()


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def behind(prefix, model):
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "module._orig_mod.", "learner.encoder.0."])
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("net",), ("checkpoint", "student", "weights")], ids=str)
def test_wrappers_and_prefixes_do_not_matter(tmp_path, prefix, keys):
    model = network()
    content = behind(prefix, model) | ({"criterion.weight": torch.ones(3)} if prefix else {})
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    assert same(read(content, tmp_path), model.state_dict())


@pytest.mark.parametrize(
    "averaged",
    [
        lambda model: {"state_dict_ema": model.state_dict()},
        lambda model: {"ema": {"module": model.state_dict()}},
        lambda model: {"modelEma": behind("module.", model)},
        lambda model: {"other": AveragedModel(model).state_dict()},
        lambda model: {"swa_model": behind("module.", model)},
    ],
)
def test_averaged_weights_are_taken_unless_they_are_not_wanted(tmp_path, averaged):
    model, mean = network(), network()
    content = {"state_dict": model.state_dict(), **averaged(mean)}
    assert same(read(content, tmp_path), mean.state_dict())
    assert same(read(content, tmp_path, use_ema=True), mean.state_dict())
    assert same(read(content, tmp_path, use_ema=False), model.state_dict())
    with pytest.raises(LoadError, match="use_ema: .* holds no averaged weights"):
        read({"state_dict": model.state_dict()}, tmp_path, use_ema=True)


def test_averaged_weights_beside_the_others_in_one_mapping(tmp_path):
    model, mean = network(), network()
    content = {"state_dict": behind("model.", model) | behind("ema_model.", mean)}
    assert same(read(content, tmp_path), mean.state_dict())
    assert same(read(content, tmp_path, use_ema=False), model.state_dict())


def test_two_networks_are_told_apart_or_refused(tmp_path):
    model, other = network(), network()
    assert same(read({"best": other.state_dict(), "model": model.state_dict()}, tmp_path), model.state_dict())
    with pytest.raises(LoadError, match="several networks, under 'student' and 'teacher'"):
        read({"student": model.state_dict(), "teacher": other.state_dict()}, tmp_path)
    assert same(read({"first": model.state_dict(), "last": model.state_dict()}, tmp_path), model.state_dict())


def test_a_mapping_in_itself_is_read_once(tmp_path):
    model = network()
    content = {"state_dict": model.state_dict()}
    content |= {"self": content, "again": content}
    assert same(read(content, tmp_path), model.state_dict())


def test_counters_may_be_missing_or_of_another_kind(tmp_path):
    model = network()
    without = {name: t for name, t in model.state_dict().items() if "num_batches" not in name}
    halved = {name: tensor.half() for name, tensor in model.state_dict().items()}
    with pytest.raises(LoadError, match="1 of 92 tensors are missing, such as 'fc.bias'"):
        read({name: tensor for name, tensor in without.items() if name != "fc.bias"}, tmp_path)
    assert same(read(without, tmp_path), model.state_dict())
    read(halved, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_taken_as_they_are(tmp_path, dtype):
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in network().state_dict().items()}
    found = read(tensors, tmp_path)
    assert found["fc.weight"].dtype == torch.float32
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in tensors.items())


def test_wide_numbers_are_rounded_with_a_word(tmp_path):
    with pytest.warns(NetcloneWarning, match=r"77 tensors .* 'conv1.0.weight', are torch.float64 and were rounded"):
        read(network().double().state_dict(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_of_another_kind_are_refused(tmp_path, dtype):
    tensors = network().state_dict()
    with pytest.raises(LoadError, match=f"tensor 'fc.weight' is {dtype}, expected torch.float32"):
        read(tensors | {"fc.weight": tensors["fc.weight"].to(dtype)}, tmp_path)


def test_other_forms_of_tensors(tmp_path):
    tensors = network().state_dict()
    assert same(read(tensors | {"fc.weight": tensors["fc.weight"].to_sparse()}, tmp_path), tensors)
    with pytest.raises(LoadError, match="'fc.weight'"):
        read(tensors | {"fc.weight": tensors["fc.weight"].to("meta")}, tmp_path)
    with pytest.raises(LoadError, match=r"'conv1.0.weight' has shape \(1,\), expected"):
        read(tensors | {"conv1.0.weight": torch.ones(1).to_sparse()}, tmp_path)


def trained(folder, model, name, **arguments):
    path = folder / "model_best.pth.tar"
    given = argparse.Namespace(train_interpolation="random", crop_pct=None, **arguments)
    torch.save({"arch": name, "state_dict": model.state_dict(), "args": given}, path)
    return path


@pytest.mark.parametrize("alone", [True, False])
def test_what_timms_training_script_says_is_taken(tmp_path, alone):
    options = {"global_pool": "max", "num_classes": 3, "output_stride": 8}
    model = timm.create_model("test_resnet", **options).eval()
    said = {"gp": "max", "model_kwargs": {"output_stride": 8}, "img_size": 64, "mean": [0.2], "std": [0.3, 0.4, 0.5]}
    path = trained(tmp_path, model, "test_resnet", interpolation="bilinear", **said)
    found = load_model(str(path) if alone else f"timm/test_resnet@{path}")
    with torch.no_grad():
        assert torch.equal(found(images := torch.randn(2, 3, 64, 64)), model(images))
    given = preparation(found)
    assert (given.size, given.mean, given.std) == ((3, 64, 64), (0.2,) * 3, (0.3, 0.4, 0.5))
    assert given.interpolation == "bilinear"
    other = preparation(load_model(str(path), images={"input_size": (3, 32, 48), "std": [1.0]}))
    assert (other.size, other.mean, other.std) == ((3, 32, 48), (0.2,) * 3, (1.0,) * 3)


def test_a_network_for_one_size_is_built_for_the_size_it_was_trained_on(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, img_size=96).eval()
    path = trained(tmp_path, model, "test_vit", input_size=[3, 96, 96])
    assert same(load_model(str(path)).state_dict(), model.state_dict())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    found = load_model(f"timm/test_vit@{tmp_path / 'plain.safetensors'}", images={"input_size": [3, 96, 96]})
    assert same(found.state_dict(), model.state_dict())
    assert preparation(found).size == (3, 96, 96)


def test_what_torchvisions_reference_scripts_say_is_taken(tmp_path):
    model = load_model("torchvision/squeezenet1_1", weights=None, num_classes=3)
    given = argparse.Namespace(model="squeezenet1_1", val_crop_size=112, val_resize_size=128, interpolation="bilinear")
    torch.save({"model": model.state_dict(), "args": given}, tmp_path / "checkpoint.pth")
    for name in (str(tmp_path / "checkpoint.pth"), f"torchvision/squeezenet1_1@{tmp_path / 'checkpoint.pth'}"):
        found = load_model(name)
        assert same(found.state_dict(), model.state_dict())
        said = preparation(found)
        assert (said.size, said.interpolation, said.crop_pct) == ((3, 112, 112), "bilinear", 112 / 128)


def test_what_says_nothing_of_images_is_said_and_left_out(tmp_path):
    path = trained(tmp_path, network(), "test_resnet", mean="imagenet", img_size=64)
    with pytest.warns(NetcloneWarning, match="mean='imagenet' is no valid preprocessing, and is ignored"):
        assert preparation(load_model(str(path))).size == (3, 64, 64)


def test_lightnings_hyperparameters(tmp_path):
    model = network()
    content = {"state_dict": behind("model.", model), "hyper_parameters": {"model_name": "test_resnet", "img_size": 72}}
    torch.save(content, tmp_path / "last.ckpt")
    found = load_model(str(tmp_path / "last.ckpt"))
    assert same(found.state_dict(), model.state_dict())
    assert preparation(found).size == (3, 72, 72)


def test_a_network_of_plain_parts_is_found_by_its_names(tmp_path):
    model = load_model("torchvision/alexnet", weights=None, num_classes=2)
    torch.save(nn.ModuleDict({"backbone": model, "other": nn.Linear(2, 2)}).state_dict(), tmp_path / "x.pth")
    assert same(load_model(f"torchvision/alexnet@{tmp_path / 'x.pth'}").state_dict(), model.state_dict())
