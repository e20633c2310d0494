"""netclone inject and remove: a grafted network in one file, and back to the target's very tensors."""

import copy
import hashlib
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


def test_a_file_says_what_was_injected_and_removed_when_and_by_whom(zoo, grafted, tmp_path, monkeypatch):
    folder, _, _ = zoo
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setenv("LOGNAME", "somebody")
    out, alone, again = (tmp_path / f"{name}.safetensors" for name in ("out", "alone", "again"))
    name = f"timm/test_resnet@{folder / 'birds.safetensors'}"
    words = ["inject", name, folder / "herons.safetensors", "--name", "ardea", "--out", out]
    assert run(*words, "--by", "Ada L.").exit_code == 0
    assert run("remove", out, "--out", alone).exit_code == 0
    assert run("inject", alone, folder / "gulls-2.safetensors", "--out", again).exit_code == 0
    facts = json.loads(run("log", again, "--json").stdout)
    assert facts["clones"] == ["gulls_2"]
    told = [tuple(event[key] for key in ("date", "action", "clone", "file", "by")) for event in facts["log"]]
    assert told == [
        ("1970-01-02", "inject", "ardea", "herons.safetensors", "Ada L."),
        ("1970-01-02", "remove", "ardea", "", ""),
        ("1970-01-02", "inject", "gulls_2", "gulls-2.safetensors", ""),
    ]
    whole = hashlib.sha256((folder / "herons.safetensors").read_bytes()).hexdigest()
    assert [event["sha256"] for event in facts["log"][:2]] == [whole, whole]
    shown = run("log", alone).stdout
    assert shown.startswith("2 entries. It holds no clone: the target is alone.\n") and "Ada L." in shown
    assert b"somebody" not in again.read_bytes()
    with torch.no_grad():
        assert same_bits(load_model(str(alone))(IMAGES), load_model(name)(IMAGES))


def test_the_same_command_on_the_same_day_gives_the_same_bytes(zoo, tmp_path, monkeypatch):
    folder, _, _ = zoo
    files = []
    for day in ("0", "86399", "86400"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", day)
        words = ["inject", f"timm/test_resnet@{folder / 'birds.safetensors'}", folder / "herons.safetensors"]
        assert run(*words, "--out", tmp_path / "out.safetensors").exit_code == 0
        files.append((tmp_path / "out.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_file_of_the_format_before_logs_is_read_and_starts_one(zoo, grafted, tmp_path):
    old, out = tmp_path / "old.safetensors", tmp_path / "out.safetensors"

    def older(facts, tensors):
        del facts["log"]
        clones = [{"name": clone["name"], "at": clone["at"]} for clone in facts["clones"]]
        facts.update(format_version=1, clones=clones)

    old.write_bytes(_header(grafted, older))
    assert read_bundle(old).log == ()
    write_bundle(read_bundle(old), out)
    assert read_bundle(out) is not None and json.loads(_said(out))["format_version"] == 1
    assert "Not known how they came there: herons, gulls_2" in run("log", old).stdout.replace("\n", " ")
    assert run("remove", old, "herons", "--out", out).exit_code == 0
    assert [event.action for event in read_bundle(out).log] == ["remove"]


@pytest.mark.parametrize("epoch", ["soon", "1e9", "9" * 30])
def test_what_cannot_stand_in_a_file_is_refused_before_it_is_written(zoo, tmp_path, monkeypatch, epoch):
    folder, _, _ = zoo
    words = ["inject", f"timm/test_resnet@{folder / 'birds.safetensors'}", folder / "herons.safetensors"]
    words += ["--out", tmp_path / "out.safetensors"]
    for by in ("/home/ada", "a\nb", "x" * 201):
        result = run(*words, "--by", by)
        assert result.exit_code == 1 and "by: got" in result.stderr
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    result = run(*words)
    assert result.exit_code == 1 and "SOURCE_DATE_EPOCH" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_checks_and_writes_nothing(zoo, tmp_path):
    folder, _, _ = zoo
    words = ["inject", f"timm/test_resnet@{folder / 'birds.safetensors'}", folder / "herons.safetensors"]
    words += ["--out", tmp_path / "out.safetensors", "--dry-run"]
    result = run(*words)
    assert result.exit_code == 0 and result.stdout.startswith("4 old classes as they were, 2 new from herons\n")
    assert "nothing was written" in result.stdout
    assert json.loads(run(*words, "--json").stdout)["dry_run"] is True
    assert run(*words, "--at", "layer9").exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["--name", "a", "--name", "b"], "got 2 names for 1 files"),
        (["--name", "two words"], "'two words' is no identifier; use letters"),
    ],
)
def test_a_clone_gets_the_name_that_is_given(zoo, tmp_path, names, why):
    words = ["inject", f"timm/test_resnet@{zoo[0] / 'birds.safetensors'}", zoo[0] / "herons.safetensors"]
    result = run(*words, "--out", tmp_path / "out.safetensors", *names)
    assert result.exit_code == 1 and why in result.stderr


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


@pytest.mark.parametrize(
    "options",
    [{"global_pool": "max"}, pytest.param({"output_stride": 8, "stem_width": 24}, marks=pytest.mark.long)],
    ids=str,
)
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


def _said(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()["netclone_bundle"]


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
        (
            lambda facts, tensors: facts.update(format_version=4),
            "this netclone reads 1 to 3: upgrade it",
        ),
        (lambda facts, tensors: facts.update(format_version=True), "this netclone reads 1 to 3"),
        (lambda facts, tensors: facts.update(format_version=1), "exactly the fields"),
        (lambda facts, tensors: facts.update(format_version=2), "exactly the fields"),
        (lambda facts, tensors: facts.pop("log"), "KeyError"),
        (lambda facts, tensors: facts.update(log={}), "log has to be a list"),
        (lambda facts, tensors: facts.update(log=facts["log"] * 5001), "10002 entries, expected at most 10000"),
        (lambda facts, tensors: facts["log"][0].update(more=1), "exactly the fields"),
        (lambda facts, tensors: facts["log"][0].update(by="\x1b[2J"), "log: 'by' has an invalid value"),
        (lambda facts, tensors: facts["log"][0].update(by="a" * 201), "log: 'by' has an invalid value"),
        (lambda facts, tensors: facts["log"][0].update(file="/etc/passwd"), "log: 'file' has an invalid value"),
        (lambda facts, tensors: facts["log"][0].update(clone=7), "log: 'clone' has an invalid value"),
        (lambda facts, tensors: facts["log"][0].update(date="2026-1-1"), "expected inject or remove, a day and"),
        (lambda facts, tensors: facts["log"][0].update(action="run"), "expected inject or remove, a day and a digest"),
        (lambda facts, tensors: facts["log"][0].update(sha256="0"), "expected inject or remove, a day and a digest"),
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
