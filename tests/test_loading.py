"""One way to name a network: of timm, torchvision, the hub and files; what is wrong with a name is said."""

import argparse
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.models import save_for_hf

import netclone
from netclone.errors import LoadError
from netclone.models.loading import load_model


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained():
    """A network as its owner has it: five classes, three channels."""
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture
def saved(trained, tmp_path):
    path = tmp_path / "birds.safetensors"
    safetensors.torch.save_file(trained.state_dict(), path)
    return path


def test_a_name_of_timm_builds_what_timm_builds_in_eval_mode():
    torch.manual_seed(0)
    ours = load_model("timm/test_vit", weights=None, num_classes=3, img_size=64)
    torch.manual_seed(0)
    assert same(ours, timm.create_model("test_vit", num_classes=3, img_size=64))
    assert not any(module.training for module in ours.modules())


def test_a_name_of_torchvision_builds_what_torchvision_builds():
    torch.manual_seed(0)
    ours = load_model("torchvision/squeezenet1_1", weights=None, num_classes=3)
    torch.manual_seed(0)
    assert same(ours, torchvision.models.squeezenet1_1(num_classes=3))


@pytest.mark.parametrize("form", ["argument", "path", "name"])
def test_a_checkpoint_fills_the_network_and_brings_its_number_of_classes(trained, saved, form):
    if form == "name":
        model = load_model(f"timm/test_resnet@{saved}")
    else:
        model = load_model("timm/test_resnet", weights=str(saved) if form == "argument" else saved)
    assert same(model, trained)
    assert model.num_classes == 5
    assert not any(module.training for module in model.modules())


def test_options_go_with_a_checkpoint(tmp_path):
    grey = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    safetensors.torch.save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    assert same(load_model("timm/test_resnet", tmp_path / "grey.safetensors", in_chans=1), grey)


def test_a_folder_that_timm_saved(trained, tmp_path):
    save_for_hf(trained, tmp_path / "model", model_config={"num_classes": 5})
    assert same(load_model(f"local-dir:{tmp_path / 'model'}"), trained)


def test_a_checkpoint_of_timms_training_script_says_its_architecture(trained, tmp_path):
    path = tmp_path / "model_best.pth.tar"
    other = timm.create_model("test_resnet", num_classes=5).state_dict()
    torch.save(
        {
            "arch": "test_resnet",
            "args": argparse.Namespace(lr=0.1),
            "epoch": 3,
            "state_dict": other,
            "state_dict_ema": {f"module.{name}": tensor for name, tensor in trained.state_dict().items()},
        },
        path,
    )
    assert same(load_model(str(path)), trained)
    assert same(load_model(f"timm/test_resnet@{path}"), trained)


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(LoadError, match=r"bad\.pth' cannot be read as tensors alone"):
        load_model("timm/test_resnet", weights=path)
    torch.save({"arch": "test_resnet", "state_dict": {}, "args": Payload()}, path)
    with pytest.raises(LoadError, match="tensors alone"):
        load_model(str(path))
    assert not (tmp_path / "was run").exists()


def test_pretrained_weights_that_cannot_be_had_are_an_error_with_a_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", _unreachable)
    with pytest.raises(LoadError, match=r"could not be loaded: OSError: no network; pass a file as weights="):
        load_model("timm/resnet18")
    with pytest.raises(LoadError, match="pretrained weights could not be loaded"):
        load_model("timm/test_resnet.no_such_tag")


def _unreachable(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm/vgg17", None, r"timm has no model 'vgg17'; did you mean 'vgg19', 'vgg16' or 'vgg13'\?"),
        ("torchvision/resnet51", None, r"torchvision has no model 'resnet51'; did you mean"),
        ("resnet18", None, r"'resnet18' names no library; did you mean 'timm/resnet18'\?"),
        (
            "keras/resnet",
            None,
            r"names no library; expected timm/\.\.\., torchvision/\.\.\., transformers/\.\.\., hf-hub:",
        ),
        ("", None, "expected text such as 'timm/resnet18'"),
        (18, None, "got 18, expected text"),
        ("timm/resnet18", 3, "weights: got int, expected 'pretrained', a file, or None"),
        ("timm/resnet18", "absent.safetensors", r"there is no file 'absent\.safetensors'"),
        (
            "timm/resnet18@a.safetensors",
            "b.safetensors",
            "already names a checkpoint; leave out",
        ),
        ("timm/test_resnet", "IMAGENET1K_V1", "no file 'IMAGENET1K_V1' for timm/test_resnet"),
        (
            "torchvision/squeezenet1_1",
            "V9",
            "no file 'V9'; torchvision/squeezenet1_1 has IMAGENET1K_V1",
        ),
        ("absent.pth", "pretrained", r"there is no file 'absent\.pth'"),
        ("absent.pth", "x.pth", "is a checkpoint already; leave out weights='x.pth'"),
        ("local-dir:absent", "pretrained", "could not be"),
    ],
)
def test_errors_name_what_is_wrong_and_the_way_out(name, weights, message):
    with pytest.raises(LoadError, match=message):
        load_model(name, weights)


def test_a_checkpoint_of_another_network_is_refused(saved, tmp_path):
    with pytest.raises(LoadError, match=r"does not fit test_vit: \d+ of \d+ tensors are missing, such as 'cls_token'"):
        load_model("timm/test_vit", saved)
    with pytest.raises(LoadError, match=r"tensor 'fc.weight' has shape \(5, \d+\), expected \(7, \d+\)"):
        load_model("timm/test_resnet", saved, num_classes=7)
    with pytest.raises(LoadError, match="does not record their architecture; name it, as in 'timm/resnet18@"):
        load_model(str(saved))
    torch.save({"state_dict": {}}, tmp_path / "plain.pth")
    with pytest.raises(LoadError, match=r"does not record its architecture \('arch'\)"):
        load_model(str(tmp_path / "plain.pth"))
    with pytest.raises(
        LoadError, match=f"for a model that timm or transformers saved there, write 'local-dir:{tmp_path}'"
    ):
        load_model(str(tmp_path))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(LoadError, match="tensors"):
        load_model("timm/test_resnet", tmp_path / "list.pth")


def test_an_option_that_the_constructor_refuses_is_an_error_of_ours():
    with pytest.raises(LoadError, match=r"test_resnet: it could not be built: TypeError: .*no_such_option"):
        load_model("timm/test_resnet", weights=None, no_such_option=1)


def test_a_file_that_is_called_as_a_word_is_not_taken_for_weights(monkeypatch, tmp_path):
    (tmp_path / "pretrained").write_bytes(b"not weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", _unreachable)
    with pytest.raises(LoadError, match="pretrained weights could not be loaded"):
        load_model("timm/resnet18")


def test_it_is_public():
    assert netclone.load_model is load_model
