"""netclone inject and remove: a grafted network in one file, and back to the target's very tensors."""

import copy
import json

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from typer.testing import CliRunner

import netclone
from netclone import extract, load_model, localize, save
from netclone import inject as graft
from netclone.cli import app
from netclone.errors import ArchiveError, CloneNameError, LoadError, NetcloneError
from netclone.files.bundling import read_bundle, write_bundle
from netclone.graph.preparing import preparation
from netclone.graph.tracing import same_bits
from netclone.runtime.digests import content_digest

pytestmark = pytest.mark.slow  # all of it rests on whole runs

runner = CliRunner()
IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A target's checkpoint, two clones' files, and the clones."""
    folder = tmp_path_factory.mktemp("zoo")
    target = timm.create_model("test_resnet", num_classes=4).eval()
    safetensors.torch.save_file(target.state_dict(), folder / "birds.safetensors")
    source = timm.create_model("test_resnet", num_classes=9)
    modules = {}
    for name, classes, keep in (("herons", [5, 7], 0.5), ("gulls-2", [1], 0.25)):
        mask = localize(source, method="magnitude", keep=keep)
        modules[name] = extract(source, mask, classes=classes, class_names=[f"bird {c}" for c in classes])
        save(modules[name].with_spec(at="input"), folder / f"{name}.safetensors")
    return folder, target, modules


def run(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def grafted(zoo):
    folder, _, _ = zoo
    out = folder / "grafted.safetensors"
    files = [folder / "herons.safetensors", folder / "gulls-2.safetensors"]
    result = run("inject", f"timm/test_resnet@{folder / 'birds.safetensors'}", *files, "--out", out)
    assert result.exit_code == 0, result.output
    for part in ("0-3", "4-5", "6-6", "herons", "gulls_2", "5 bird 5, 7 bird 7"):
        assert part in result.output
    return out


def test_the_file_is_a_model_that_computes_what_inject_gives(zoo, grafted):
    _, target, modules = zoo
    model = load_model(str(grafted))
    want = graft(target, modules["herons"], at="input", name="herons")
    want = graft(want, modules["gulls-2"], at="input", name="gulls_2")
    with torch.no_grad():
        assert same_bits(model(IMAGES), want(IMAGES))
        assert same_bits(model(IMAGES)[:, :4], target(IMAGES))


@pytest.mark.parametrize("order", [("herons", "gulls_2"), ("gulls_2", "herons")])
def test_removal_in_any_order_leaves_the_targets_very_tensors(zoo, grafted, order, tmp_path):
    folder, target, _ = zoo
    one, none = tmp_path / "one.safetensors", tmp_path / "none.safetensors"
    assert run("remove", grafted, order[0], "--out", one).exit_code == 0
    assert load_model(str(one))(IMAGES).shape[1] == 4 + {"herons": 1, "gulls_2": 2}[order[0]]
    result = run("remove", one, "--out", none)
    assert result.exit_code == 0
    assert "the target as it was" in result.output.replace("\n", "")
    left, before = safetensors.torch.load_file(none), safetensors.torch.load_file(folder / "birds.safetensors")
    assert left.keys() == before.keys()
    assert all(same_bits(left[name], before[name]) for name in before)


@pytest.mark.long
def test_a_grafted_file_takes_more_clones(zoo, grafted, tmp_path):
    folder, target, _ = zoo
    out = tmp_path / "more.safetensors"
    (tmp_path / "third.safetensors").write_bytes((folder / "herons.safetensors").read_bytes())
    result = run("inject", grafted, tmp_path / "third.safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        logits = load_model(str(out))(IMAGES)
        assert same_bits(logits[:, :7], load_model(str(grafted))(IMAGES))
    assert same_bits(logits[:, 7:], logits[:, 4:6])
    assert same_bits(logits[:, :4], target(IMAGES))


def test_an_architecture_of_torchvision_is_found_again(zoo, tmp_path):
    folder, _, _ = zoo
    network = load_model("torchvision/squeezenet1_1", weights=None, num_classes=3)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "cups.safetensors")
    name = f"torchvision/squeezenet1_1@{tmp_path / 'cups.safetensors'}"
    source = timm.create_model("test_resnet", num_classes=9)
    save(extract(source, localize(source, method="magnitude"), classes=[2]), tmp_path / "mugs.safetensors")
    result = run("inject", name, tmp_path / "mugs.safetensors", "--at", "input", "--out", tmp_path / "both.safetensors")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        assert same_bits(load_model(str(tmp_path / "both.safetensors"))(IMAGES)[:, :3], network(IMAGES))


def test_a_grafted_file_can_be_looked_into(zoo, grafted):
    _, target, modules = zoo
    facts = json.loads(run("inspect", grafted, "--json").stdout)
    assert facts["architecture"] == "timm/test_resnet"
    assert facts["values"] == sum(tensor.numel() for tensor in target.state_dict().values())
    assert facts["config"]["input_size"] == [3, 160, 160]
    assert [clone["name"] for clone in facts["clones"]] == ["herons", "gulls_2"]
    assert [clone["classes"] for clone in facts["clones"]] == [[5, 7], [1]]
    assert facts["clones"][0]["parameters"] == sum(tensor.numel() for tensor in modules["herons"].parameters())
    shown = run("inspect", grafted)
    assert shown.exit_code == 0, shown.output
    for part in ("timm/test_resnet", "5 bird 5, 7 bird 7", "gulls_2", "input"):
        assert part in shown.output, shown.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["inject", "timm/test_resnet@{folder}/none.safetensors", "{folder}/herons.safetensors"], "no file"),
        (["inject", "timm/test_resnot", "{folder}/herons.safetensors"], "did you mean 'test_resnet"),
        (["inject", "timm/test_resnet@{folder}/birds.safetensors", "{folder}/none.safetensors"], "cannot read"),
        (["inject", "timm/test_resnet@{folder}/birds.safetensors", "{folder}/birds.safetensors"], "cannot read clone"),
        (
            ["inject", "timm/test_resnet@{folder}/birds.safetensors", "{folder}/herons.safetensors", "--at", "layer9"],
            "9",
        ),
        (["inject", "{folder}/grafted.safetensors", "{folder}/herons.safetensors"], "name"),
        (["remove", "{folder}/birds.safetensors"], "netclone inject writes such files"),
        (["remove", "{folder}/grafted.safetensors"], "no name was given, and the file holds 'herons', 'gulls_2'"),
        (["remove", "{folder}/grafted.safetensors", "storks"], "no clone 'storks'"),
        (["remove", "{folder}/none.safetensors"], "there is no such file"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_leaves_no_file(zoo, grafted, tmp_path, arguments, why):
    out = tmp_path / "out.safetensors"
    result = run(*(argument.format(folder=zoo[0]) for argument in arguments), "--out", out)
    assert result.exit_code == 1, result.output
    assert why in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_how_the_target_wants_its_images_and_calls_its_classes_is_kept(zoo, tmp_path):
    folder, _, _ = zoo
    own = {"input_size": (3, 64, 48), "mean": (0.1, 0.2, 0.3), "std": (0.5,) * 3, "label_names": list("abcd")}
    own |= {"interpolation": "bilinear", "crop_pct": 0.5}
    model = timm.create_model("test_resnet", num_classes=4, pretrained_cfg_overlay=own)
    save_for_hf(model, tmp_path / "target", safe_serialization=True, model_config=own)
    name, out = f"local-dir:{tmp_path / 'target'}", tmp_path / "grafted.safetensors"
    result = run("inject", name, folder / "herons.safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    want = preparation(load_model(name))
    assert want.size == (3, 64, 48)
    for clones in (1, 2):
        grafted = load_model(str(out))
        assert preparation(grafted) == want
        assert list(grafted.pretrained_cfg["label_names"])[:4] == list("abcd")
        if clones == 1:  # a grafted file that takes more keeps what it says
            assert run("inject", out, folder / "gulls-2.safetensors", "--out", out).exit_code == 0


@pytest.mark.parametrize("options", [{"global_pool": "max"}, {"output_stride": 8, "stem_width": 24}], ids=str)
def test_a_target_of_other_options_comes_back_from_its_file(zoo, tmp_path, options):
    folder, _, _ = zoo
    model = timm.create_model("test_resnet", num_classes=4, **options).eval()
    save_for_hf(model, tmp_path / "hub", model_args=options, safe_serialization=True)
    out = tmp_path / "out.safetensors"
    result = run("inject", f"local-dir:{tmp_path / 'hub'}", folder / "herons.safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        assert same_bits(load_model(str(out))(IMAGES)[:, :4], model(IMAGES))
    alone = tmp_path / "alone.safetensors"
    assert run("remove", out, "--out", alone).exit_code == 0
    for name in (str(alone), f"timm/test_resnet@{alone}"):
        with torch.no_grad():
            assert same_bits(load_model(name)(IMAGES), model(IMAGES))


def test_a_removed_target_is_as_it_was_in_dtype_preparation_and_words(zoo, tmp_path):
    folder, _, modules = zoo
    target = timm.create_model("test_efficientnet", num_classes=4, pad_type="same").eval().bfloat16()
    own = {"mean": (0.1, 0.2, 0.3), "label_names": ["a", "b", "c", "d"]}
    target.pretrained_cfg = {**target.pretrained_cfg, **own}
    module = copy.deepcopy(modules["herons"]).bfloat16()
    images = IMAGES.bfloat16()
    grafted = netclone.inject(target, module, at="input", name="x", example_inputs=images, allow_mismatch=True)
    netclone.save_grafted(grafted, tmp_path / "grafted.safetensors", target=target)
    assert run("remove", tmp_path / "grafted.safetensors", "--out", tmp_path / "alone.safetensors").exit_code == 0
    back = load_model(str(tmp_path / "alone.safetensors"))
    with torch.no_grad():
        assert same_bits(back(images), target(images))
    assert preparation(back) == preparation(target)
    assert back.pretrained_cfg["label_names"] == own["label_names"]
    assert back.state_dict().keys() == target.state_dict().keys()


@pytest.mark.parametrize("said", ['"timm/test_resnet"', "[", "{}", '{"architecture": "os.system"}', "1e999"])
def test_what_a_checkpoint_says_of_its_network_is_data(tmp_path, said):
    path = tmp_path / "changed.safetensors"
    tensors = timm.create_model("test_resnet", num_classes=4).state_dict()
    safetensors.torch.save_file(tensors, path, metadata={"netclone_target": said})
    with pytest.raises(LoadError, match="changed.safetensors"):
        load_model(str(path))


@pytest.mark.parametrize(
    "options", [{"checkpoint_path": "x.pth"}, {"act_layer": {"a": 1}}, {"img_size": 10**9}], ids=str
)
def test_options_that_a_checkpoint_says_are_data(tmp_path, options):
    path = tmp_path / "changed.safetensors"
    said = {"architecture": "timm/test_resnet", "config": {}, "options": options}
    tensors = timm.create_model("test_resnet", num_classes=4).state_dict()
    safetensors.torch.save_file(tensors, path, metadata={"netclone_target": json.dumps(said)})
    with pytest.raises(LoadError, match="options: "):
        load_model(str(path))


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained": True},
        {"pretrained_cfg": "a"},
        {"checkpoint_path": "x.pth"},
        {"weights_backbone": "DEFAULT"},
        {"act_layer": {"name": "os.system"}},
        {"img_size": 10**9},
        {"a b": 1},
        [],
    ],
    ids=str,
)
def test_options_in_a_file_are_data(grafted, options, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(_header(grafted, lambda facts, tensors: facts.update(options=options)))
    with pytest.raises(ArchiveError, match="options: "):
        load_model(str(path))


def _header(grafted, change):
    with safetensors.safe_open(grafted, "pt") as file:
        facts = json.loads(file.metadata()["netclone_bundle"])
    tensors = safetensors.torch.load_file(grafted)
    change(facts, tensors)
    facts.pop("sha256", None)
    facts["sha256"] = content_digest(facts, tensors)  # anyone can sign: what is refused is refused for what it says
    return safetensors.torch.save(tensors, metadata={"netclone_bundle": json.dumps(facts)})


def test_any_other_bit_or_dtype_is_noticed_and_a_file_without_a_digest_says_the_way_out(grafted, tmp_path):
    content = _header(grafted, lambda facts, tensors: None)
    path = tmp_path / "changed.safetensors"
    for place in (-1, -5000, len(content) // 2):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ArchiveError, match="the file is damaged"):
            load_model(str(path))
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with pytest.raises(ArchiveError, match="the file is damaged"):
        load_model(str(path))
    with safetensors.safe_open(grafted, "pt") as file:
        facts = json.loads(file.metadata()["netclone_bundle"])
    del facts["sha256"]
    tensors = safetensors.torch.load_file(grafted)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"netclone_bundle": json.dumps(facts)}))
    with pytest.raises(ArchiveError, match="before such files had a digest.* with netclone inject"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda facts, tensors: facts.update(format_version=3), "this netclone reads up to 2"),
        (lambda facts, tensors: facts.update(architecture="os.system"), "expected timm/... or torchvision/..."),
        (lambda facts, tensors: facts.update(architecture="timm/os.system"), "timm has no model"),
        (lambda facts, tensors: facts.update(architecture="timm/test_vit"), "does not fit test_vit"),
        (lambda facts, tensors: facts.update(more=1), "exactly the fields"),
        (lambda facts, tensors: facts.update(architecture="timm/\x1b[2J"), "architecture: got"),
        (
            lambda facts, tensors: facts["config"].update(label_names=["gull\u202e"]),
            "'label_names' has an invalid",
        ),
        (
            lambda facts, tensors: facts["config"].update(crop_mode="\x1b[2J"),
            "'crop_mode' has an invalid",
        ),
        (lambda facts, tensors: facts["clones"][0].update(at="\ud800"), "text without control characters"),
        (
            lambda facts, tensors: facts["config"].update(url="file:///etc"),
            "config: got .* expected an object of some of",
        ),
        (
            lambda facts, tensors: facts["config"].update(input_size=[3, 10**6, 10**6]),
            "'input_size' has an invalid",
        ),
        (lambda facts, tensors: facts["config"].update(mean=[0.5, "0.5", 0.5]), "'mean' has an invalid"),
        (lambda facts, tensors: facts["config"].update(std=[0.5, 0, 0.5]), "'std' has an invalid"),
        (
            lambda facts, tensors: facts["config"].update(crop_pct=float("nan")),
            "'crop_pct' has an invalid",
        ),
        (
            lambda facts, tensors: facts["config"].update(label_names="gull"),
            "'label_names' has an invalid",
        ),
        (lambda facts, tensors: facts["clones"][0].update(name="storks"), "the archive of clone 'storks' is missing"),
        (lambda facts, tensors: facts["clones"].pop(), "is not the target's and not a clone"),
        (lambda facts, tensors: tensors["clone.herons"][-1].add_(1), "digest"),
        (lambda facts, tensors: tensors.pop("target.fc.bias"), "are missing"),
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(grafted, change, why, tmp_path):
    path = tmp_path / "changed.safetensors"
    path.write_bytes(_header(grafted, change))
    with pytest.raises((ArchiveError, LoadError), match=why):
        load_model(str(path))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_the_header_is_refused_or_harmless(grafted, data, tmp_path):
    content = bytearray(grafted.read_bytes())
    size = int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        bundle = read_bundle(path)
    except NetcloneError:
        return
    assert all(isinstance(tensor, torch.Tensor) for tensor in bundle.tensors.values())


def test_writing_where_nothing_can_be_written_is_an_error(grafted, tmp_path):
    bundle = read_bundle(grafted)
    with pytest.raises(ArchiveError, match="there is no folder"):
        write_bundle(bundle, tmp_path / "none" / "x.safetensors")
    with pytest.raises(ArchiveError, match="cannot write"):
        write_bundle(bundle, tmp_path)
    with pytest.raises(CloneNameError, match="the file holds none"):
        bundle.without("herons").without("gulls_2").without(None)
