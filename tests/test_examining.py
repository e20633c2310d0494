"""netclone evaluate: named networks on folders of pictures, which get the columns of the network's logits."""

import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import timm
import torch
from pictures import folder
from typer.testing import CliRunner

import netclone
from netclone import extract, load_model, localize, save
from netclone.cli import app
from netclone.graph.numbers import numbers_digests
from netclone.graph.preparing import preparation
from netclone.metrics.evaluating import Scores
from netclone.metrics.held_out import far_apart, held_out
from netclone.workflows.examining import evaluate, opened

pytestmark = pytest.mark.slow  # all of it rests on whole runs


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, a source of four classes, a target of two, and both clones of the one in the other."""
    root = tmp_path_factory.mktemp("colours")
    folder(root / "all", ["blue", "green", "grey", "red"], count=4)
    folder(root / "old", ["green", "grey"], count=3)
    torch.manual_seed(1)
    for name, classes in (("source", 4), ("target", 2)):
        model = timm.create_model("test_resnet", num_classes=classes)
        safetensors.torch.save_file(model.state_dict(), root / f"{name}.safetensors")
    source = load_model(named(root, "source"))
    mask = localize(source, method="magnitude", keep=0.5)
    for name, classes, names in (("reds", [3], ["red"]), ("blues", [0], ())):
        module = extract(source, mask, classes=classes, class_names=names)
        save(module.with_spec(at="input"), root / f"{name}.safetensors")
    alone = root / "reds_alone.safetensors"
    assert run("inject", named(root, "target"), root / "reds.safetensors", "--out", alone).exit_code == 0
    files = [root / "reds.safetensors", root / "blues.safetensors"]
    result = run("inject", named(root, "target"), *files, "--out", root / "grafted.safetensors")
    assert result.exit_code == 0, result.output
    return root


def named(root, name):
    return f"timm/test_resnet@{root / name}.safetensors"


def test_pictures_get_the_columns_of_the_classes_they_show(root):
    subject = opened(str(root / "grafted.safetensors"), str(root / "all"), str(root / "old"), batch_size=5)
    labels = torch.cat([labels for _, labels in subject])
    assert labels.tolist() == 3 * [0] + 3 * [1] + 4 * [2]  # green and grey are the target's, red the first clone's
    assert subject.names == {0: "green", 1: "grey", 2: "red", 3: "0"}  # the second clone has no names


def test_a_class_without_a_name_is_found_by_its_column(root, tmp_path):
    folder(tmp_path, ["0", "red", "7"], count=2)
    subject = opened(str(root / "grafted.safetensors"), str(tmp_path), None)
    assert torch.cat([labels for _, labels in subject]).tolist() == [3, 3, 2, 2]


def test_old_and_new_classes_come_from_one_folder_and_what_is_left_out_is_said(root, tmp_path):
    lines = []
    folder(tmp_path, ["red", "1", "0", "pink"], count=2)
    subject = opened(str(root / "reds_alone.safetensors"), str(tmp_path), None, note=lines.append)
    assert torch.cat([labels for _, labels in subject]).tolist() == [0, 0, 1, 1, 2, 2]
    assert subject.names == {0: "0", 1: "1", 2: "red"}
    assert [line for line in lines if "left out" in line] == [
        f"data: 1 of the 4 classes in '{tmp_path}' are left out: pink"
    ]
    folder(tmp_path / "named", ["red", "gull", "tern"], count=2)
    subject = opened(str(root / "reds_alone.safetensors"), str(tmp_path / "named"), None)
    assert subject.names == {0: "gull", 1: "tern", 2: "red"}
    found = run("evaluate", root / "reds_alone.safetensors", "--data", tmp_path / "named", "--json")
    scores = json.loads(found.stdout)["scores"]
    assert (scores["samples"], scores["old"] is None, scores["new"] is None) == (6, False, False)


def test_broken_pictures_stop_or_are_counted(root, tmp_path):
    folder(tmp_path, ["green", "grey"], count=3)
    (tmp_path / "grey" / "1.png").write_bytes(b"broken")
    words = ["evaluate", named(root, "target"), "--target-data", tmp_path, "--json"]
    result = run(*words)
    assert result.exit_code == 1
    assert "grey/1.png' cannot be read" in result.stderr
    result = run(*words, "--skip-broken")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scores"]["samples"] == 5
    assert "1 of 6 images cannot be read and are skipped" in result.stderr


def test_scores_are_those_of_evaluate_in_python(root):
    grafted = load_model(str(root / "grafted.safetensors"))
    subject = opened(str(root / "grafted.safetensors"), str(root / "all"), str(root / "old"))
    batches = list(subject)
    source = load_model(named(root, "source"))
    want = netclone.evaluate(grafted, batches, reference=subject.target, source=source, name="reds")
    paths = str(root / "all"), str(root / "old")
    told = []
    found = evaluate(
        str(root / "grafted.safetensors"),
        *paths,
        source=named(root, "source"),
        name="reds",
        progress=lambda *step: told.append(step),
    )
    assert found.scores == want
    assert found.scores.locality_closed == 0
    assert found.scores.samples == 10
    assert found.cost.parameters == sum(parameter.numel() for parameter in grafted.parameters())
    assert found.target.parameters == sum(parameter.numel() for parameter in subject.target.parameters())
    assert found.source.macs > 0
    own = netclone.evaluate(subject.target, [(images, labels) for images, labels in batches], old=[0, 1], new=[2, 3])
    assert found.scores.old_before == own.old
    reds = torch.cat([images[labels == 2] for images, labels in batches])
    alone = netclone.evaluate(source, (reds, torch.full((len(reds),), 3)))
    assert found.scores.new_source == alone.all
    assert told[-1] == ("images", 10, 10)


PREPARED = ("--img-size", 48, "--mean", "0.5", "--std", "0.25,0.5,1", "--interpolation", "bicubic", "--crop-pct", 0.5)
IMAGES = {
    "input_size": [3, 48, 48],
    "mean": [0.5] * 3,
    "std": [0.25, 0.5, 1.0],
    "interpolation": "bicubic",
    "crop_pct": 0.5,
}


def test_the_command_line_says_how_pictures_are_prepared(root):
    options = (named(root, "target"), "--target-data", root / "old", "--json")
    result = run("evaluate", *options, *PREPARED)
    assert result.exit_code == 0, result.output
    network = load_model(named(root, "target"), images=IMAGES)
    loader = opened(named(root, "target"), None, str(root / "old"), images=IMAGES)
    assert next(iter(loader))[0].shape[1:] == (3, 48, 48)
    want, as_it_was = netclone.evaluate(network, loader), json.loads(run("evaluate", *options).stdout)["scores"]
    scores = json.loads(result.stdout)["scores"]
    assert scores["calibration_error"] == pytest.approx(want.calibration_error)
    assert scores["calibration_error"] != pytest.approx(as_it_was["calibration_error"])


def test_a_grafted_file_keeps_how_pictures_are_prepared(root, tmp_path):
    target = load_model(named(root, "target"), images={**IMAGES, "input_size": [3, 160, 160]})
    out = tmp_path / "out.safetensors"
    result = run("inject", named(root, "target"), root / "reds.safetensors", "--out", out, *PREPARED[2:])
    assert result.exit_code == 0, result.output
    assert preparation(load_model(str(out))) == preparation(target)
    assert run("remove", out, "--out", out).exit_code == 0
    assert preparation(load_model(str(out))) == preparation(target)


@pytest.mark.parametrize(
    ("flag", "which"), [((), "averaged"), (("--use-ema",), "averaged"), (("--no-use-ema",), "own")]
)
def test_averaged_weights_are_taken_or_left(root, tmp_path, flag, which):
    tensors = {name: timm.create_model("test_resnet", num_classes=2).state_dict() for name in ("own", "averaged")}
    torch.save({"state_dict": tensors["own"], "state_dict_ema": tensors["averaged"]}, tmp_path / "last.pth")
    name = f"timm/test_resnet@{tmp_path / 'last.pth'}"
    assert run("inject", name, root / "reds.safetensors", "--out", tmp_path / "out.safetensors", *flag).exit_code == 0
    found = load_model(str(tmp_path / "out.safetensors")).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors[which].items())


def test_only_force_grafts_a_clone_onto_another_target(root, tmp_path):
    module = netclone.load(root / "reds.safetensors")
    target = load_model(named(root, "target"))
    save(
        module.with_spec(target_digests=numbers_digests(netclone.trace(target, torch.zeros(1, 3, 160, 160)))),
        tmp_path / "fitted.safetensors",
    )
    out = tmp_path / "out.safetensors"
    assert run("inject", named(root, "target"), tmp_path / "fitted.safetensors", "--out", out).exit_code == 0
    out.unlink()
    with torch.no_grad():
        target.fc.bias.add_(1.0)
    safetensors.torch.save_file(target.state_dict(), tmp_path / "other.safetensors")
    other = f"timm/test_resnet@{tmp_path / 'other.safetensors'}"
    refused = run("inject", other, tmp_path / "fitted.safetensors", "--out", out)
    assert refused.exit_code == 1 and not out.exists()
    assert "its weights were others" in refused.stderr and "--force" in refused.stderr
    forced = run("inject", other, tmp_path / "fitted.safetensors", "--out", out, "--force")
    assert forced.exit_code == 0 and out.exists()
    assert forced.stderr.startswith("Warning: ") and "its weights were others" in forced.stderr


def test_a_network_without_clones_is_measured_on_its_own_classes(root):
    found = evaluate(named(root, "target"), None, str(root / "old"))
    scores = found.scores
    assert (scores.new, scores.locality_closed, scores.samples) == (None, None, 6)
    assert (found.target, found.source, scores.old_before, found.promised) == (None, None, None, {})


def test_figures_far_from_those_of_the_held_out_images_are_said(root, tmp_path):
    module = netclone.load(root / "reds.safetensors")
    save(module.with_spec(scores=(("validation", 0.5), ("old", -1.0), ("new", 0.99))), tmp_path / "far.safetensors")
    out = tmp_path / "out.safetensors"
    assert run("inject", named(root, "target"), tmp_path / "far.safetensors", "--out", out).exit_code == 0
    words = ["evaluate", out, "--data", root / "all", "--target-data", root / "old"]
    assert json.loads(run(*words, "--json").stdout)["far_apart"][-1] == "old"
    assert "Note: old classes: -100.0% on images held out when the clone was made, " in run(*words).stderr


@pytest.mark.parametrize("away", [-1, 1])
def test_figures_are_far_apart_from_five_points_on(away):
    scores = Scores(0.8 + 0.049 * away, 0.8 + 0.051 * away, 0.8, 0.0, 0.0, 100, 0.1, None)
    assert far_apart({"old": 0.8, "new": 0.8}, scores) == {"new": (0.8, scores.new)}
    assert far_apart({"new": 0.8}, replace(scores, new=0.8 + 0.049 * away)) == {}


def test_only_accuracies_that_were_kept_with_the_clone_are_compared(root):
    module = netclone.load(root / "reds.safetensors")
    scores = Scores(0.2, 0.2, 0.2, 0.0, 0.0, 100, 0.1, None)
    assert module.scores == {} and far_apart(held_out(module), scores) == {}
    kept = module.with_spec(scores=(("validation", 0.9), ("old before", 0.9), ("new", 0.9)))
    assert held_out(kept) == {"new": 0.9}
    assert far_apart(held_out(kept), scores) == {"new": (0.9, 0.2)}
    assert far_apart(held_out(kept), replace(scores, new=None)) == {}  # no image of a new class is there now
    assert held_out(kept.with_bias(0.5)) == {}


def test_a_machine_gets_json_and_a_person_a_table(root):
    arguments = ["evaluate", root / "grafted.safetensors", "--data", root / "all", "--target-data", root / "old"]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(facts["scores"]) >= {"old", "new", "all", "locality_open", "locality_closed"}
    assert facts["cost"]["macs"] > 0
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert f"accuracy, new classes {facts['scores']['new']:.1%}" in shown
    assert "closed locality 0.0% of old images change" in shown
    before, after = (f"{facts['scores'][kind]:.1%}" for kind in ("old_before", "old"))
    assert shown.startswith(f"old {before} to {after}, new {facts['scores']['new']:.1%}, on 10 images")
    assert f"accuracy, old classes {before} {after}" in shown
    assert "Next: see which images changed: netclone report" in shown
    assert facts["costs"]["target"]["parameters"] < facts["cost"]["parameters"]
    assert "similarity" not in shown


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["{root}/grafted.safetensors"], "got no images; pass a folder with --data, --target-data or both"),
        (["{root}/grafted.safetensors", "--data", "{root}/old"], "none of the classes in .* was cloned: it has green"),
        (
            ["timm/test_resnet@{root}/target.safetensors", "--data", "{root}/all"],
            "has no clone; pass images",
        ),
        (
            ["{root}/grafted.safetensors", "--target-data", "{root}/all"],
            "'blue' of .* is not one of the network's 2",
        ),
        (["{root}/grafted.safetensors", "--data", "{root}/none"], "cannot read|cannot be read"),
        (["{root}/reds.safetensors", "--target-data", "{root}/old"], "does not record their architecture"),
        (
            [
                "{root}/grafted.safetensors",
                "--data",
                "{root}/all",
                "--source",
                "timm/test_resnet@{root}/source.safetensors",
            ],
            "the graph holds the clones 'reds', 'blues'; say which",
        ),
        (
            ["{root}/grafted.safetensors", "--data", "{root}/all", "--source", "timm/test_resnot"],
            "no model 'test_resnot'; did you mean",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(root, arguments, why):
    result = run("evaluate", *(argument.format(root=root) for argument in arguments))
    assert result.exit_code == 1, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert re.search(why, line), line
    assert "Traceback" not in result.stderr


def test_a_report_names_the_classes_by_their_folders_and_says_how_to_get_it_again(root, tmp_path):
    arguments = ["--data", root / "all", "--target-data", root / "old", "--name", "reds"]
    result = run("report", root / "grafted.safetensors", *arguments, "--out", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    page = (tmp_path / "page.html").read_text()
    assert facts["bytes"] == len(page.encode()) < 2_000_000
    assert facts["differing"] == 0
    for part in ("green", "grey", "red", f"--data {root / 'all'} --target-data {root / 'old'}", "--name reds"):
        assert part in page, part
    assert "data:image" in page
    result = run("report", named(root, "target"), "--target-data", root / "old", "--out", tmp_path / "other.html")
    assert result.exit_code == 1
    assert "has no clone; give a file that netclone inject wrote" in result.stderr
    assert not (tmp_path / "other.html").exists()
