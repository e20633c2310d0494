"""A run that was ended goes on from what it had found, to the very same clone."""

import importlib

import pytest
import timm
import torch
from torch import nn

import netclone
from netclone import clone
from netclone.cloning import method, searching
from netclone.errors import ArchiveError
from netclone.runtime import resuming
from netclone.runtime.resuming import Findings

pytestmark = pytest.mark.slow  # all of it rests on whole runs


def network(name, classes, seed):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
    return model


def cloned(path=None, **options):
    source, target = network("test_efficientnet", 4, 1), network("test_resnet", 2, 2)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(24)
    settings = {
        "classes": [2, 3],
        "target_data": [(images, labels % 2)],
        "method": "taylor",
        "without": ["adapter_start"],
    }
    settings |= {"method": "taylor", "epochs": 3, "distill_steps": 3, "batch_size": 8, "search": "all", **options}
    return clone(source, target, [(images, labels % 4)], findings=Findings(path), **settings)


@pytest.fixture(scope="module")
def whole():
    return cloned()


def same(one, two):
    states = one.state_dict(), two.state_dict()
    bits = all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True))
    return one.spec == two.spec and list(states[0]) == list(states[1]) and bits


class Gone(BaseException):
    """As if the process were killed."""


@pytest.mark.parametrize(
    ("function", "calls"),
    [("distill", 1), ("fit", 1), *(pytest.param(*at, marks=pytest.mark.long) for at in [("fit", 3), ("_finished", 1)])],
)
def test_wherever_it_ends_it_goes_on_to_the_same_clone(whole, tmp_path, monkeypatch, function, calls):
    place = method if function == "distill" else searching
    path, original, done = tmp_path / "x.part", getattr(place, function), []

    def interrupted(*arguments, **options):
        done.append(function)
        if len(done) == calls:
            raise Gone
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, function, interrupted)
        with pytest.raises(Gone):
            cloned(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.part"]
    counts = {name: 0 for name in ("localize", "distill", "fit")}

    def counted(name):
        place = searching if name == "fit" else method
        original = getattr(place, name)

        def call(*arguments, **options):
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    for name in counts:
        counted(name)
    module = cloned(path)
    assert same(module, whole)
    longer = int(whole.at != "input")  # where there is no adapter, the classifier is fitted in closed form each time
    fits = len(whole.spec.search) - 1 + longer
    fits = {"distill": fits, "fit": fits - (calls - 1), "_finished": longer}[function]
    assert counts == {"localize": 0, "distill": int(function == "distill"), "fit": fits}


def test_what_a_run_of_other_arguments_found_is_not_used(whole, tmp_path):
    path = tmp_path / "x.part"
    cloned(path, seed=1)
    assert same(cloned(path), whole)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-10],
        lambda content: content.replace(b"key", b"kez", 1),
        lambda content: content.replace(b"mask", b"task", 1),
        lambda content: content.replace(b"0.one", b"7.one", 1),
        lambda content: b"\xff" * 7,
        lambda content: b"",
    ],
)
def test_a_damaged_file_counts_as_none(tmp_path, spoil):
    path = tmp_path / "x.part"
    findings = Findings(path)
    findings.open("key of this run")
    findings.keep("mask", {"one": torch.ones(3)})
    path.write_bytes(spoil(path.read_bytes()))
    again = Findings(path)
    again.open("key of this run")
    assert again.recall("mask") is None


def test_findings_are_plain_files(tmp_path):
    path = tmp_path / "x.part"
    findings = Findings(path)
    findings.open("one")
    findings.forget()
    assert len(findings) == 0 and findings.recall("mask") is None
    transposed = torch.arange(6.0).view(2, 3).T
    findings.keep("fit", {"a.b": transposed, "scale": torch.tensor(2.0)}, 1 / 3)
    again = Findings(path)
    again.open("one")
    tensors, number = again.recall("fit")
    assert tensors.keys() == {"a.b", "scale"}
    assert number == 1 / 3 and torch.equal(tensors["a.b"], transposed) and float(tensors["scale"]) == 2
    other = Findings(path)
    other.open("two")
    other.forget()
    assert len(other) == 0 and path.exists()
    again.forget()
    assert not path.exists()
    with pytest.raises(ArchiveError, match="intermediate results: "):
        Findings(tmp_path / "none" / "x.part").keep("mask", {})


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        pytest.param("localize", "localizing", marks=pytest.mark.long),
        ("distil", "distilling"),
    ],
)
def test_a_run_that_ends_within_a_stage_goes_on_from_its_last_step(tmp_path, monkeypatch, stage, module):
    """Not from the stage's beginning: mask and distillation keep their optimizer, last batch and generator."""
    monkeypatch.setattr(resuming, "PERIOD", 0.0)
    loops = importlib.import_module(f"netclone.learning.{module}")
    original, steps = loops.step, []

    def counted(*arguments, **options):
        steps.append(stage)
        return original(*arguments, **options)

    monkeypatch.setattr(loops, "step", counted)
    options = {"method": "local", "distill_steps": 12, "epochs": 1, "at": "layer3"}
    want = cloned(**options)
    in_all, path = len(steps), tmp_path / "x.part"

    def ended(what, done, total):
        if what == stage and done == 7:
            raise Gone

    with pytest.raises(Gone):
        cloned(path, progress=ended, **options)
    steps.clear()
    told = []
    assert same(cloned(path, progress=lambda what, done, total: told.append((what, done)), **options), want)
    assert len(steps) == in_all - 7
    assert (stage, 7) not in told and (stage, 8) in told


def test_a_stage_that_is_done_keeps_nothing_of_its_way(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "PERIOD", 0.0)
    findings = Findings(tmp_path / "x.part")
    findings.open("key")
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([weight])
    findings.unfinished("mask").keep(1, [weight], optimizer, torch.Generator(), (weight, weight))
    assert findings.stages == ("mask, unfinished",)
    findings.keep("mask", {"one": torch.ones(1)})
    again = Findings(tmp_path / "x.part")
    again.open("key")
    assert findings.stages == again.stages == ("mask",)
    assert Findings().unfinished("mask") is None


def test_an_unfinished_stage_is_written_now_and_then(tmp_path, monkeypatch):
    """Writing takes time and room: not at every step."""
    clock = [0.0]
    monkeypatch.setattr(resuming.time, "monotonic", lambda: clock[0])
    findings = Findings(tmp_path / "x.part")
    unfinished, weight = findings.unfinished("mask"), torch.ones(3)
    optimizer, written = torch.optim.SGD([weight]), []
    monkeypatch.setattr(Findings, "keep", lambda self, name, tensors, steps: written.append(steps))
    for steps in range(1, 31):
        clock[0] += 1
        unfinished.keep(steps, [weight], optimizer, torch.Generator(), (weight, weight))
    assert written == [10, 20, 30]


def test_what_another_version_found_is_not_used(tmp_path, monkeypatch):
    path, seen = tmp_path / "x.part", []

    def ended(what, done, total):
        seen.append(what)
        if what == "refit":
            raise Gone

    for _ in range(2):
        seen.clear()
        with pytest.raises(Gone):
            cloned(path, progress=ended)
    assert "localize" not in seen
    found = path.read_bytes()
    for owner, name, other in ((netclone, "__version__", "another"), (method, "code_digest", lambda name: "another")):
        seen.clear()
        path.write_bytes(found)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            with pytest.raises(Gone):
                cloned(path, progress=ended)
        assert "localize" in seen


def test_a_resumed_run_says_what_it_goes_on_from(tmp_path):
    path, said = tmp_path / "x.part", []
    first = Findings(path, resumed=said.append)
    first.open("key")
    first.keep("mask", {})
    assert said == []
    Findings(path, resumed=said.append).open("another key")
    assert said == []
    Findings(path, resumed=said.append).open("key")
    assert said == [("mask",)]
