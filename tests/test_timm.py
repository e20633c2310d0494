"""A grafted file by name in timm: what timm.create_model and timm's scripts get is what netclone.load_model gives."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import netclone
import netclone.timm as by_name
from netclone.errors import ArgumentError, LoadError, NetcloneWarning
from netclone.files.bundling import Bundle, write_bundle
from netclone.graph.preparing import preparation
from netclone.graph.tracing import same_bits
from netclone.zoo.naming import known

FILE = "grafted.safetensors"
SCRIPT = """
import argparse, sys
import torch
from timm.data import resolve_data_config
from timm.models import create_model, is_model
from timm.utils import ParseKwargs
from beside import SIZE  # a script finds what lies beside it

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
args = parser.parse_args()
assert is_model(args.model)
model = create_model(args.model, pretrained=True, num_classes=None, in_chans=3, global_pool=None, scriptable=False,
                     checkpoint_path="", **args.model_kwargs)
config = resolve_data_config({}, model=model, use_test_size=True)
print(__name__, model.num_classes, config["input_size"] == SIZE, model.pretrained_cfg["label_names"])
"""


SIZE = (3, 64, 64)


def made_of(name, folder, **options):
    """A grafted network of random weights, its target, and the folder with its file."""
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=8, pretrained_cfg_overlay={"input_size": SIZE})
    mask = netclone.localize(source, method="magnitude", keep=0.5)
    module = netclone.extract(source, mask, classes=[5, 7], class_names=["heron", "ibis"])
    target = timm.create_model(name, num_classes=4, pretrained_cfg_overlay={"input_size": SIZE}, **options).eval()
    nn.init.normal_(target.get_classifier().weight)
    target.pretrained_cfg |= {"label_names": ["crow", "gull", "tern", "wren"], "test_input_size": (3, 288, 288)}
    target.pretrained_cfg["test_crop_pct"] = 1.0
    made = netclone.inject(target, module, at="input", name="birds")
    netclone.save_grafted(made, folder / FILE)
    return made, target, folder


@pytest.fixture(scope="module")
def grafted(tmp_path_factory):
    return made_of("test_efficientnet", tmp_path_factory.mktemp("grafted"))


def images(count=3):
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(count))


def test_timm_gets_the_network_of_the_file_as_netclone_reads_it(grafted):
    made, target, folder = grafted
    before = torch.get_rng_state()
    model = timm.create_model("netclone", pretrained=True, file=str(folder / FILE), num_classes=6, in_chans=3)
    assert torch.equal(before, torch.get_rng_state())
    with torch.inference_mode():
        assert same_bits(model(images()), made(images()))
        assert same_bits(model(images())[:, :4], target(images()))
    assert netclone.clones(model) == ("birds",) and not model.training
    assert model.num_classes == 6
    assert model.label_names == ("crow", "gull", "tern", "wren", "heron", "ibis")
    assert model.pretrained_cfg["label_names"] == list(model.label_names)
    config = resolve_data_config({}, model=model, use_test_size=True)  # as validate.py asks
    assert config == resolve_data_config({}, model=target, use_test_size=False)
    plain = netclone.remove(model)
    with torch.inference_mode():
        assert same_bits(plain(images()), target(images()))
    assert not hasattr(plain, "forward_features") and "netclone_head" not in plain.meta


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_the_methods_are_the_targets_own_to_the_bit(name, grafted, tmp_path):
    _, target, folder = grafted if name == "test_efficientnet" else made_of(name, tmp_path, img_size=64)
    model = timm.create_model("netclone", file=str(folder / FILE))
    names = set(model.state_dict())
    for network in (model, copy.deepcopy(model)):
        with torch.inference_mode():
            features = network.forward_features(images())
            assert same_bits(features, target.forward_features(images()))
            want = target.forward_head(features, pre_logits=True)
            assert same_bits(network.forward_head(features, pre_logits=True), want)
        own, birds = network.get_classifier()
        assert same_bits(own.weight, target.get_classifier().weight) and own is not target.get_classifier()
        assert birds is network.clones["birds"]
        with pytest.raises(ArgumentError, match="clones read other positions too; call the network itself"):
            network.forward_head(features)
    assert set(model.state_dict()) == names
    wide = copy.deepcopy(model).double()
    assert wide.forward_features(images().double()).dtype == torch.float64


def test_without_them_nothing_is_promised(grafted):
    made, _, _ = grafted
    for name in ("forward_features", "forward_head", "get_classifier"):
        assert not hasattr(made, name)
        with pytest.raises(AttributeError, match=f"{name}: a grafted network has it if timm made it of a file"):
            getattr(made, name)


def test_what_does_not_fit_the_file_is_refused(grafted):
    _, _, folder = grafted
    file = str(folder / FILE)
    with pytest.raises(ArgumentError, match=r"file: got none; .* --model-kwargs file=grafted.safetensors"):
        timm.create_model("netclone", checkpoint_path=file)
    with pytest.raises(ArgumentError, match=r"num_classes: got 10, and '.*' has 6; leave it out"):
        timm.create_model("netclone", file=file, num_classes=10)
    with pytest.raises(ArgumentError, match="in_chans: got 1, and '.*' has 3; leave it out"):
        timm.create_model("netclone", file=file, in_chans=1)
    with pytest.raises(ArgumentError, match="drop_rate: a grafted file has the options of its network"):
        timm.create_model("netclone", file=file, drop_rate=0.1)
    with pytest.raises(LoadError, match="nowhere.safetensors"):
        timm.create_model("netclone", file=str(folder / "nowhere.safetensors"))


def test_other_preprocessing_is_the_callers_choice(grafted):
    _, _, folder = grafted
    overlay = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}
    model = timm.create_model("netclone", file=str(folder / FILE), pretrained_cfg_overlay=overlay)
    assert (preparation(model).mean, preparation(model).crop_pct) == ((0.1, 0.2, 0.3), 0.8)


def test_images_in_another_order_of_channels_are_warned_of(grafted, tmp_path):
    """Also where the file holds no clone any more."""
    _, target, _ = grafted
    bundle = Bundle("timm/test_efficientnet", target.state_dict(), config={"channel_order": "bgr"})
    write_bundle(bundle, tmp_path / FILE)
    with pytest.warns(NetcloneWarning, match="in the order of BGR, and timm's transforms give RGB"):
        model = timm.create_model("netclone", file=str(tmp_path / FILE))
    assert model.num_classes == 4 and model.get_classifier().out_features == 4


@pytest.mark.slow
def test_a_script_of_timm_runs_with_the_name_registered(grafted, tmp_path):
    """In a process of its own, as timm's scripts are run."""
    _, target, folder = grafted
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text(f"SIZE = {preparation(target).size}")
    command = [sys.executable, "-m", "netclone.timm", str(tmp_path / "script.py"), "--model", "netclone"]
    done = subprocess.run(
        [*command, "--model-kwargs", f"file={folder / FILE}"], capture_output=True, text=True, check=True
    )
    labels = ["crow", "gull", "tern", "wren", "heron", "ibis"]
    assert done.stdout.splitlines()[-1] == f"__main__ 6 True {labels}"


def test_a_script_that_is_not_there_is_said():
    with pytest.raises(SystemExit, match=r"no script 'validate.py'\nusage: python -m netclone.timm SCRIPT.py"):
        by_name.main(["validate.py", "--model", "netclone"])
    with pytest.raises(SystemExit, match="^usage: python -m netclone.timm"):
        by_name.main([])


def test_it_is_no_network_of_timm_itself():
    assert timm.is_model("netclone") and "timm/netclone" not in known()
