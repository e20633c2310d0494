"""netclone inspect: what a file says about its clone, for people and for machines."""

import json
from dataclasses import replace

import pytest
import timm
from typer.testing import CliRunner

from netclone import extract, load, localize, save
from netclone.cli import app
from netclone.files.inspecting import facts, inspect
from netclone.files.spec import Candidate, Gate

runner = CliRunner()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    source = timm.create_model("test_resnet", num_classes=4)
    module = extract(source, localize(source, method="magnitude", keep=0.5), classes=[1, 3], class_names=["a", "[b]"])
    tried = (Candidate("layer3", "layer3", None, "no map"), Candidate("input", None, 0.875))
    module = module.with_spec(at="input", search=tried, scores=(("all", 0.875),))
    path = tmp_path_factory.mktemp("clone") / "clone.safetensors"
    save(module, path)
    return path, module


def test_the_header_says_what_the_clone_is_without_its_tensors(file, tmp_path):
    path, module = file
    found = inspect(path)
    assert found.spec == module.spec
    assert found.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert found.bytes == path.stat().st_size
    torn = tmp_path / "torn.safetensors"  # the last tensor's bytes are others: only loading would notice
    torn.write_bytes(path.read_bytes()[:-4] + b"abcd")
    assert inspect(torn).sha256 == found.sha256


def test_json_holds_all_of_it(file):
    path, module = file
    result = runner.invoke(app, ["inspect", str(path), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["classes"] == [1, 3]
    assert facts["class_names"] == ["a", "[b]"]
    assert facts["certificate"] == module.certificate
    assert facts["search"][0] == {"at": "layer3", "source_at": "layer3", "score": None, "reason": "no map"}
    assert facts["kept"] == [list(kept) for kept in module.spec.kept]


def test_a_person_sees_classes_scores_what_was_kept_and_what_was_tried(file):
    result = runner.invoke(app, ["inspect", str(file[0])])
    assert result.exit_code == 0, result.output
    for part in ("1 a, 3 [b]", "all 0.875", "no map", "87.5%", "█", "conv1"):
        assert part in result.output, result.output


def test_fits_that_were_compared_are_a_table_and_not_among_the_scores(file, tmp_path):
    scores = (("validation", 0.5), ("left out, no fit", 0.4), ("left out, linear (chosen)", 0.75))
    scores += (("loss left out, no fit", 2.5), ("loss left out, linear (chosen)", 1.25))
    save(file[1].with_spec(scores=scores), tmp_path / "fits.safetensors")
    result = runner.invoke(app, ["inspect", str(tmp_path / "fits.safetensors")])
    words = [line.replace("│", " ").split() for line in result.output.splitlines()]
    assert ["scores", "validation", "0.5"] in words
    assert ["no", "fit", "0.4", "2.5"] in words and ["linear", "(chosen)", "0.75", "1.25"] in words


def test_a_gate_is_told(file):
    found = inspect(file[0])
    assert facts(found)["gate"] == ""
    gate = Gate((("global_pool", (96,)),), 0.5, 0.031)
    told = facts(replace(found, spec=replace(found.spec, gate=gate)))["gate"]
    assert told == "50% of old images and 97% of new ones are sent to the clone (cross-validated); reads global_pool"


def test_what_fewer_bits_changed_is_shown(file, tmp_path):
    save(file[1], tmp_path / "small.safetensors", dtype="int8")
    result = runner.invoke(app, ["inspect", str(tmp_path / "small.safetensors")])
    ((_, error),) = load(tmp_path / "small.safetensors").spec.stored
    assert f"int8 (off by {error:.1e} of the largest logit)" in " ".join(result.output.split())


def test_a_file_that_is_none_is_one_line_and_exit_code_1(tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"12345678901234567890")
    for path, why in ((tmp_path / "none.safetensors", "no such file"), (other, "header"), (tmp_path, "not a file")):
        result = runner.invoke(app, ["inspect", str(path)])
        assert result.exit_code == 1
        assert "Error: cannot read" in result.stderr
        assert why in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
