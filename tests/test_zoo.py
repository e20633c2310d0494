"""The zoo: networks by pattern, one row each whatever happens to it, and the table; two dozen are checked."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import untouched
from torch import nn
from typer.testing import CliRunner

from netclone import zoo
from netclone.cli import app
from netclone.errors import ArgumentError
from netclone.graph import modes
from netclone.zoo import building, checking, naming, sweeping, tabulating

QUICK = (
    *(f"timm/test_{name}" for name in ("byobnet", "convnext", "convnext2", "efficientnet", "efficientnet_gn")),
    *(
        f"timm/test_{name}"
        for name in ("efficientnet_ln", "mambaout", "nfnet", "resnet", "vit", "vit2", "vit3", "vit4")
    ),
    *(f"transformers/{name}" for name in naming.TRANSFORMERS),
)
DEFAULT = ("timm/test_resnet", "timm/test_vit")

LARGER = (
    "timm/deit_tiny_distilled_patch16_224",  # class and distillation tokens
    "timm/resnest14d",  # split attention
    "torchvision/shufflenet_v2_x0_5",  # channel shuffle
    "torchvision/lraspp_mobilenet_v3_large",  # segmentation: a dictionary of maps
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",  # detection: its backbone
    "torchvision/mc3_18",  # video
)


@functools.cache
def checked(name):
    """The row of a network, for all tests that read one; in fewer modes of larger networks."""
    return zoo.check(name, modes=modes.QUICK if name in LARGER else modes.SPREAD)  # half precision is slow on CPUs


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.long) for name in QUICK + LARGER],
)
def test_two_dozen_networks_pass(name):
    row = checked(name)
    assert row.target.passed, row.target.reason
    if row.source is not None:
        assert row.source.passed, row.source.reason
        assert row.source.error <= 1e-9


@pytest.mark.zoo
@pytest.mark.parametrize("name", naming.names(["*", "torchvision/*", "transformers/*"]))
def test_every_network_passes(name):
    row = zoo.check(name, source=False, real=0)
    assert row.passed, row.target.reason


def test_patterns_name_networks():
    assert zoo.names(["resnet18", "timm/resnet1*t", "resnet18"]) == (
        "timm/resnet18",
        "timm/resnet10t",
        "timm/resnet14t",
    )
    everything = zoo.names(["*", "torchvision/*", "transformers/*"])
    assert len(everything) == len(set(everything)) == len(naming.known())
    assert not [name for name in everything if "quantized" in name or "raft" in name]
    with pytest.raises(ArgumentError, match=r"pattern: 'resnest99\*' matches no network of timm"):
        zoo.names(["resnest99*"])


def test_matches_of_a_pattern_come_by_name_and_patterns_as_they_were_given():
    assert zoo.names(["transformers/[vd]*t", "torchvision/vgg11*", "resnet1[08]?"]) == (
        *("transformers/deit", "transformers/vit", "torchvision/vgg11", "torchvision/vgg11_bn"),
        *("timm/resnet101", "timm/resnet10t", "timm/resnet18d"),  # timm itself has them by number
    )


def test_a_pattern_without_a_library_is_of_timm_and_no_other():
    assert zoo.names(["vgg11"]) == ("timm/vgg11",) and zoo.names(["torchvision/vgg11"]) == ("torchvision/vgg11",)
    for pattern in ("alexnet", "torch*/nothing", "timm/alexnet"):
        with pytest.raises(ArgumentError, match="matches no network"):
            zoo.names(["vgg11", pattern])


def test_what_a_network_of_torchvision_does_is_said_by_its_package():
    kinds = {name: naming.kind(f"torchvision/{name}") for name in ("vgg11", "ssd300_vgg16", "fcn_resnet50", "r3d_18")}
    assert list(kinds.values()) == ["classification", "detection", "segmentation", "video"]
    assert naming.known()["torchvision/ssd300_vgg16"] == "torchvision/detection/ssd"
    assert naming.known()["torchvision/vgg11"] == "torchvision/vgg"
    assert naming.kind("transformers/vit") == "classification"


def test_all_of_timm_is_known_and_belongs_to_a_family():
    import timm

    import netclone.timm  # noqa: F401 - a network that is not timm's own

    known = naming.known()
    names = {name.removeprefix("timm/") for name in known if name.startswith("timm/")}
    assert names == set(timm.list_models()) - {"netclone"}
    families = {family for name, family in known.items() if name.startswith("timm/")}
    assert families == {f"timm/{timm.models.model_entrypoint(name).__module__.rpartition('.')[2]}" for name in names}


def test_the_smallest_of_each_family():
    seen = []
    found = zoo.smallest(["timm/vgg13", "timm/resnet18", "timm/vgg11"], progress=lambda *step: seen.append(step))
    assert found == ("timm/vgg11", "timm/resnet18")
    others = ("torchvision/squeezenet1_1", "transformers/vit")
    assert zoo.smallest(("torchvision/squeezenet1_0", *others)) == others
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm/pnasnet5large", (3, 331, 331)),  # as stated
        ("timm/vit_small_patch16_dinov3", (3, 256, 256)),
        ("timm/deepseek_vit_412m", (3, 252, 252)),  # states 546, takes multiples of 126
        ("timm/tf_efficientnet_b7", (3, 256, 256)),  # states 600, takes any
        ("timm/eva_large_patch14_336", (3, 336, 336)),
        ("timm/vit_base_patch16_siglip_512", (3, 512, 512)),  # takes no other
        ("torchvision/ssd300_vgg16", (3, 300, 300)),
        ("torchvision/vit_h_14", (3, 224, 224)),  # its best weights are for 518
        ("torchvision/fcos_resnet50_fpn", (3, 128, 128)),
    ],
)
def test_images_are_of_the_size_a_network_states_and_small_where_any_will_do(name, size):
    assert zoo.build(name, "meta").size == size


@pytest.mark.parametrize(
    "name",
    [
        "timm/test_resnet",
        "torchvision/lraspp_mobilenet_v3_large",
        pytest.param("torchvision/r3d_18", marks=pytest.mark.long),
        "transformers/deit",
    ],
)
def test_a_network_of_the_zoo_returns_one_matrix_and_is_the_same_at_every_call(name):
    before = torch.get_rng_state()
    one, two = zoo.build(name), zoo.build(name)
    assert torch.equal(before, torch.get_rng_state())
    assert not one.model.training
    with torch.no_grad():
        out = one.model(one.images(2))
        assert out.dim() == 2 and len(out) == 2
        assert torch.equal(out, two.model(two.images(2)))
    assert zoo.build(name, "meta").parameters == one.parameters


def test_randomised_leaves_nothing_constant_and_the_signal_alive():
    network = zoo.build("timm/test_resnet")
    nn.init.zeros_(network.model.fc.weight)
    model = zoo.randomised(network.model.double(), network.images(4).double())
    assert all(parameter.std() > 0 for parameter in model.parameters() if parameter.numel() > 1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_mean.std() > 0 and norm.running_var.min() > 0 for norm in norms)
    assert all(norm.momentum == 0.1 and not norm.training for norm in norms)
    with torch.no_grad():
        assert float(model(network.images(3).double()).std()) > 1e-3


@pytest.mark.slow
def test_a_row_survives_json():
    row = checked("timm/test_resnet")
    assert zoo.Row.from_dict(json.loads(json.dumps(row.as_dict()))) == row
    without = zoo.check("timm/test_resnet", source=False, modes=modes.QUICK[:1])
    assert zoo.Row.from_dict(json.loads(json.dumps(without.as_dict()))) == without
    assert without.source is None


def test_a_network_without_memory_is_checked_as_a_target():
    row = zoo.check("timm/test_vit", real=0)
    assert row.passed and row.weights == "meta" and row.source is None
    assert len(row.target.positions) == 3


class Breaks(nn.Module):
    def forward(self, x):
        return x[x > 0].sum()[None]


def test_what_fails_is_a_row_with_a_reason(monkeypatch):
    def broken(name, device="cpu", seed=0):
        return building.Network(name, nn.Sequential(nn.Conv2d(3, 4, 1), Breaks()), (3, 8, 8))

    monkeypatch.setattr(checking, "build", broken)
    row = checking.check("timm/resnet18")
    assert not row.passed and not row.target.passed and not row.source.passed
    assert "Error" in row.target.reason and "\n" not in row.target.reason
    monkeypatch.setattr(checking, "build", _raises)
    row = checking.check("timm/resnet18")
    assert row.target.reason.startswith("OSError: no such thing (_raises, test_zoo.py:")


def _raises(*args, **kwargs):
    raise OSError("no such thing")


def test_a_clone_that_changed_the_target_would_be_noticed(monkeypatch):
    def clumsy(*args, **kwargs):
        grafted = inject(*args, **kwargs)
        with torch.no_grad():
            next(grafted.parameters()).add_(1e-3)
        return grafted

    inject = checking.inject
    monkeypatch.setattr(checking, "inject", clumsy)
    row = checking.check("timm/test_resnet", source=False)
    assert row.target.reason == "CheckFailed: after removal, tensors differ from the target's"


@pytest.mark.long
def test_a_removal_that_left_something_would_be_noticed(monkeypatch):
    def forgetful(grafted, name=None):
        left = remove(grafted, name)
        left.add_module("left_over", nn.Identity())
        return left

    remove = checking.remove
    monkeypatch.setattr(checking, "remove", forgetful)
    row = checking.check("timm/test_resnet")
    assert row.target.reason.startswith("CheckFailed: after removal, names, shapes, flags or code")
    assert row.source.reason == "CheckFailed: in the fixed target: removal left a difference"


def test_the_probe_fits_any_shape_and_reads_all_of_it():
    for shape in ((5,), (7, 3), (4, 6, 6), (2, 3, 4, 5)):
        module = checking.probe(shape)
        x = torch.randn(3, *shape, requires_grad=True)
        with untouched(module):
            out = module(x)
        assert out.shape == (3, 2)
        out.sum().backward()
        assert x.grad.abs().sum() > 0


@pytest.mark.long
def test_a_sweep_is_resumed_and_rows_come_in_the_order_asked_for(tmp_path, monkeypatch):
    names = ("timm/test_vit", "timm/test_resnet")
    rows = zoo.sweep(names, tmp_path, source=False)
    assert [row.name for row in rows] == list(names) and all(row.passed for row in rows)
    assert all(row.peak_mb > 50 for row in rows)
    monkeypatch.setattr(sweeping, "each", lambda task, names, limits: pytest.fail("done again") if names else ())
    assert zoo.sweep(names[::-1], tmp_path, source=False) == rows[::-1]
    with pytest.raises(pytest.fail.Exception):
        zoo.sweep(names, tmp_path, source=True)  # another question


def test_limits_end_one_network_and_not_the_sweep(tmp_path):
    limits = zoo.Limits(seconds=180, memory_mb=200, processes=2)  # less than torch takes alone
    (row,) = zoo.sweep(["timm/test_resnet"], tmp_path / "memory", limits=limits)
    assert row.target.reason == "stopped: more than the limit of 200 MB"
    started = time.monotonic()
    (row,) = zoo.sweep(["timm/resnet50"], tmp_path / "time", limits=zoo.Limits(seconds=0.01))
    assert row.target.reason == "stopped: more than the limit of 0.01 s"
    assert time.monotonic() - started < 60  # it was not waited for
    with pytest.raises(ArgumentError, match="expected seconds and MB above 0"):
        zoo.sweep([], tmp_path, limits=zoo.Limits(processes=0))
    with pytest.raises(ArgumentError, match="device: 'nosuch' cannot be used here"):
        zoo.sweep([], tmp_path / "device", device="nosuch")
    assert not (tmp_path / "device").exists()


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_behind(tmp_path):
    (tmp_path / "sleeping.py").write_text(
        "import os, pathlib, time\n"
        "def task(name):\n"
        "    pathlib.Path(name).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
    )
    pid = tmp_path / "pid"
    script = (
        "import sleeping\n"
        "from netclone.runtime.processes import Limits, each\n"
        f"list(each(sleeping.task, [{str(pid)!r}], Limits(seconds=600)))\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    with subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}) as sweep:
        try:
            _until(lambda: pid.is_file() and pid.read_text() != "")
        finally:
            sweep.kill()
    _until(lambda: not _runs(int(pid.read_text())))


def _until(holds, seconds=120):
    """Wait for what another process does; the limit is for a fault, not for speed."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def _runs(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip() not in ("", "Z")  # one that nobody waits for stays as a zombie


def test_the_table_says_in_how_many_modes_bits_were_compared():
    passed = checking.TargetResult(True, capture="symbolic", modes=28)
    of = zoo.Row("timm/one", "timm/one", 1, (3, 8, 8), "random", passed, None, 1.0)
    column = tabulating.HEADINGS.index("old logits, to the bit")
    for row, says in (
        (of, "28 modes"),
        (replace(of, target=replace(passed, modes=20, unsupported=8)), "20 modes, of 28; it fails in the others"),
        (replace(of, weights="meta", target=replace(passed, modes=0)), "same operators and flags"),
        (replace(of, target=replace(passed, modes=0)), "not in modes"),  # swept before modes were checked
        (replace(of, target=checking.TargetResult(False, "no")), "✗ failed"),
    ):
        assert tabulating.cells(row)[column] == says


def test_a_target_whose_bits_differ_in_one_mode_fails_and_the_mode_is_told(monkeypatch):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            y = self.conv(x).mean((2, 3))
            return self.head(2 * y if torch.is_inference_mode_enabled() else y)

    monkeypatch.setattr(checking, "build", lambda *_: zoo.Network("timm/moody", Moody().eval(), (3, 8, 8)))
    row = zoo.check("timm/moody", source=False)
    assert not row.passed
    assert "in 10 of 28 modes the target's logits are not bitwise" in row.target.reason
    assert "the first inference_mode, batch of 1, bfloat16" in row.target.reason and "node 'head'" in row.target.reason


@pytest.mark.slow
def test_the_table_holds_every_row_and_its_reasons(tmp_path):
    rows = [
        checked("timm/test_resnet"),
        zoo.Row("timm/<odd>|name", "timm/odd", 0, (), "", checking.TargetResult(False, "Error: a < b"), None, 1.0),
    ]
    zoo.write(rows, tmp_path, "netclone zoo")
    written = json.loads((tmp_path / "zoo.json").read_text())
    assert written["summary"]["networks"] == 2
    assert written["summary"]["targets"] == written["summary"]["sources"] == 1
    text = (tmp_path / "zoo.md").read_text()
    assert written["summary"]["targets_in_modes"] == 1 and written["summary"]["modes"] == rows[0].target.modes == 28
    assert "| 28 modes |" in text and "Old logits were compared to the bit on 1 of them" in text
    assert "1 of 2 networks pass as targets" in text and "timm/<odd>\\|name" in text
    assert text.index("timm/<odd>") < text.index("timm/test_resnet")  # by name
    assert "| ✗ failed | ✗ failed |  |" in text and "| ✓\N{NO-BREAK SPACE}symbolic | 28 modes | ✓ |" in text
    assert "<details><summary>1</summary>target: Error: a &lt; b</details>" in text
    html = (tmp_path / "zoo.html").read_text()
    assert "<details open><summary>1</summary>" in html and html.count("<details") == 2
    assert html.count("<tr") == 3 and "timm/&lt;odd&gt;|name" in html and "a &lt; b" in html
    assert "http" not in html  # nothing is fetched
    for kind in ("md", "html"):
        (tmp_path / f"zoo.{kind}").unlink()
    assert zoo.report(tmp_path) == tuple(rows)
    assert (tmp_path / "zoo.md").read_text() == text and (tmp_path / "zoo.html").read_text() == html
    with pytest.raises(ArgumentError, match="no zoo in"):
        zoo.report(tmp_path / "absent")


@pytest.mark.parametrize("folder", ["zoo", "zoo/targets", "zoo/cuda"])
def test_the_committed_tables_are_what_the_committed_figures_give(folder, tmp_path):
    """``netclone zoo --report --out docs/zoo`` wrote them."""
    committed = Path(__file__).parent.parent / "docs" / folder
    shutil.copy(committed / "zoo.json", tmp_path)
    zoo.report(tmp_path)
    for name in ("zoo.json", "zoo.md", "zoo.html"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), name


@pytest.mark.long
def test_a_table_of_targets_alone_says_nothing_of_sources(tmp_path):
    row = zoo.check("timm/test_resnet", source=False)
    zoo.write([row], tmp_path, "netclone zoo --targets-only")
    for kind in ("md", "html"):
        text = (tmp_path / f"zoo.{kind}").read_text()
        assert "1 of 1 networks pass as targets" in text
        assert "source" not in text and "prunable" not in text and "peak, MB" in text


@pytest.mark.slow
def test_the_command_writes_the_table_and_says_what_failed(tmp_path, monkeypatch):
    out = tmp_path / "zoo"
    result = CliRunner().invoke(app, ["zoo", "test_resnet", "--targets-only", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "1 of 1 pass as targets" in result.output
    assert json.loads((out / "zoo.json").read_text())["command"] == (
        "netclone zoo 'test_resnet' --targets-only --real 60 --seconds 180 --memory 6000 --processes 2 --out zoo"
    )
    (out / "zoo.md").unlink()
    result = CliRunner().invoke(app, ["zoo", "--report", "--out", str(out)])
    assert result.exit_code == 0 and (out / "zoo.md").exists()
    result = CliRunner().invoke(app, ["zoo", "no_such_*", "--out", str(out)])
    assert result.exit_code == 1 and "matches no network" in result.output
    failed = zoo.Row("timm/x", "timm/x", 0, (), "", checking.TargetResult(False, "TraceError: why"), None, 1.0)
    tabulating.write([failed], out, "netclone zoo 'x'")
    result = CliRunner().invoke(app, ["zoo", "--report", "--out", str(out)])
    assert result.exit_code == 1 and "TraceError: why" in result.output


class Chain(nn.Module):
    """A residual network of any length."""

    def __init__(self, blocks, width=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = 0.7 * (x + block(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param("five thousand operators", marks=pytest.mark.zoo),
        pytest.param("every parameter frozen", marks=pytest.mark.long),
    ],
)
def test_networks_that_broke_others(trouble, monkeypatch):
    torch.manual_seed(0)
    model = (Chain(460, 16) if trouble.startswith("five") else Chain(3)).eval().requires_grad_(False)
    monkeypatch.setattr(checking, "build", lambda name, device="cpu": building.Network(name, model, (3, 6, 6)))
    row = checking.check("timm/resnet18")
    assert row.passed, (row.target.reason, row.source.reason)
    assert row.source.prunable > 0.9
    if trouble.startswith("five"):
        assert row.source.nodes > 5000
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_network_whose_constructor_computes_is_built_without_memory_too():
    network = building.build("torchvision/regnet_y_400mf", "meta")
    assert all(parameter.is_meta for parameter in network.model.parameters())
