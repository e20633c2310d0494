"""The demo, run once for real, and what it promises; the command line around it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import netclone
from netclone import cli, demo

runner = CliRunner()


def shorter(*args: Any, **kwargs: Any) -> netclone.CloneModule:
    """The demo's clone, distilled for fewer steps."""
    return netclone.clone(*args, **kwargs, distill_steps=40)


@pytest.fixture(scope="module", params=["shorter", pytest.param("as it is", marks=pytest.mark.long)])
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """The demo's output and its folder."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "out"
    torch.manual_seed(123)
    before = torch.get_rng_state(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "shorter":
            patch.setattr(demo, "clone", shorter)
        result = runner.invoke(cli.app, ["demo", "--seed", "0", "--out", str(out)])
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == torch.get_num_threads()
    assert result.exit_code == 0, result.output
    return result, out


@pytest.fixture(scope="module")
def results(ran: tuple[Result, Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ran[1] / "results.json").read_text(encoding="utf-8"))
    return data


@pytest.mark.slow
def test_writes_three_files_and_nothing_else(ran: tuple[Result, Path]) -> None:
    assert sorted(path.name for path in ran[1].iterdir()) == ["digits.safetensors", "grafted.png", "results.json"]
    assert (ran[1] / "grafted.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_knows_all_ten_and_keeps_its_own(results: dict[str, Any]) -> None:
    scores = results["scores"]
    assert scores["grafted"]["all"] >= 0.9
    assert abs(scores["grafted"]["old"] - scores["target"]["old"]) <= 0.03
    assert scores["grafted"]["new"] >= 0.9
    assert scores["grafted"]["locality_closed"] == 0
    assert scores["target"]["new"] == 0
    removed, target = ({**scores[which], "ms_per_image": None} for which in ("removed", "target"))
    assert removed == target
    assert scores["source"]["all"] >= 0.9


@pytest.mark.slow
def test_every_claim_was_checked(results: dict[str, Any]) -> None:
    claims = {check["claim"]: check for check in results["checks"]}
    assert all(check["holds"] for check in claims.values())
    assert claims["old-class logits are bitwise equal to the target's"]["seen"].endswith("0 differ")
    assert "removal leaves the target bit-identical" in claims
    assert len(claims) == 7


@pytest.mark.slow
def test_module_is_smaller_than_the_source(results: dict[str, Any]) -> None:
    costs = results["costs"]
    assert costs["module"]["parameters"] < costs["source"]["parameters"]
    assert costs["module"]["macs"] < costs["source"]["macs"]
    assert costs["grafted"]["parameters"] == costs["target"]["parameters"] + costs["module"]["parameters"]
    assert results["clone"]["certificate"] < 1e-9


@pytest.mark.slow
def test_results_tell_how_they_came_about(ran: tuple[Result, Path], results: dict[str, Any]) -> None:
    assert results["command"] == f"netclone demo --seed 0 --out {ran[1]}"
    assert results["versions"]["netclone"] == netclone.__version__
    del results["command"]  # the one path in it is the one the user gave
    assert not re.search(r"(?<!\w)/\w+/", json.dumps(results))


@pytest.mark.slow
def test_the_file_holds_the_module(ran: tuple[Result, Path], results: dict[str, Any]) -> None:
    module = netclone.load(ran[1] / "digits.safetensors")
    assert (module.classes, module.class_names) == ((7, 8, 9), ("7", "8", "9"))
    assert module.at == results["clone"]["at"]
    assert sum(p.numel() for p in module.parameters()) == results["costs"]["module"]["parameters"]


@pytest.mark.slow
def test_prints_tables_and_claims(ran: tuple[Result, Path]) -> None:
    output = ran[0].output
    for words in ("target before", "target with the clone", "clone removed", "source", "MACs", "latency"):
        assert words in output
    assert output.count("true ") >= 7 and "false" not in output


def test_help_has_an_example() -> None:
    assert "netclone demo --seed" in runner.invoke(cli.app, ["--help"]).output
    shown = runner.invoke(cli.app, ["demo", "--help"])
    assert shown.exit_code == 0
    assert "Example: netclone demo" in shown.output


def test_version() -> None:
    assert runner.invoke(cli.app, ["--version"]).output == f"netclone {netclone.__version__}\n"


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "netclone", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"netclone {netclone.__version__}\n"), done.stderr


def test_an_error_is_one_line_and_exit_1(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    result = runner.invoke(cli.app, ["demo", "--out", str(taken)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: out: cannot write to") and result.stderr.count("\n") == 1
    assert taken.read_text() == "mine"


@pytest.mark.long
def test_a_claim_that_is_not_true_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_a_hurry(*args: Any, **kwargs: Any) -> netclone.CloneModule:
        return netclone.clone(*args, **{**kwargs, "at": "layer3", "method": "magnitude", "epochs": 1})

    monkeypatch.setattr(demo, "train_network", lambda *args, **kwargs: None)
    monkeypatch.setattr(demo, "clone", in_a_hurry)
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "not true: the grafted model knows at least 90%" in result.stderr
    assert not list(tmp_path.iterdir())


def test_interrupted_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_network", interrupt)
    mine = tmp_path / "out" / "results.json"
    mine.parent.mkdir()
    mine.write_text("older")
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert os.listdir(tmp_path / "out") == ["results.json"] and mine.read_text() == "older"


def test_folders_are_left_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(netclone.ArgumentError, match="seed"):
        demo.lay_out(-1, tmp_path / "out")
    (tmp_path / "mine" / "digits").mkdir(parents=True)
    result = runner.invoke(cli.app, ["demo", "--folders", str(tmp_path / "mine")])
    assert result.exit_code == 1
    assert "folders: there is a 'digits' in" in result.stderr and "choose another folder" in result.stderr
    monkeypatch.setattr(demo, "train_network", interrupt)
    assert runner.invoke(cli.app, ["demo", "--folders", str(tmp_path / "out")]).exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine" / "digits").iterdir())


def test_seed_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(netclone.ArgumentError, match="seed"):
        demo.run(-1, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_same_seed_same_network_and_no_trace_in_the_random_state() -> None:
    before = torch.get_rng_state()
    one, two = (demo.make_network(demo.TARGET, 7, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_split_is_stratified_and_fixed() -> None:
    one, two = demo.load_data(), demo.load_data()
    assert torch.equal(one.images, two.images) and torch.equal(one.test_labels, two.test_labels)
    assert len(one.labels) + len(one.test_labels) == 1797
    share = torch.bincount(one.test_labels) / torch.bincount(torch.cat([one.labels, one.test_labels]))
    assert bool(((share - 0.25).abs() < 0.01).all())


def test_finds_what_a_removal_would_leave_behind() -> None:
    before = netclone.trace(demo.make_network(demo.TARGET, 7, 0), torch.zeros(2, 1, 32, 32))
    assert demo._differences(before, netclone.trace(before)) == []
    after = netclone.trace(before)
    with torch.no_grad():
        after.get_parameter("fc.bias")[0] += 1e-7
    after.get_submodule("bn1").train()
    after.get_parameter("fc.weight").requires_grad_(False)
    assert demo._differences(before, after) == [
        "'fc.bias' differs",
        "modules or their training flags differ",
        "parameters or their requires_grad differ",
    ]
