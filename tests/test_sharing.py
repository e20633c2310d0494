"""Several processes share a run: the same mask and clone, each picture read once, one file, and a clean end."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import netclone
from netclone.channels.grouping import channel_groups
from netclone.cli import app
from netclone.cloning import searching
from netclone.cloning.extracting import refit, slim_down
from netclone.errors import DataError, WorkerError
from netclone.graph.tracing import same_bits
from netclone.learning.data import Samples
from netclone.learning.distilling import distill
from netclone.learning.neighbourhoods import Neighbourhoods
from netclone.learning.stepping import Loop
from netclone.runtime.sharing import ALONE, Workers, is_main, launched, share

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves pictures open

TESTS = Path(__file__).parent
FIT = searching.fit
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCH = [*LAUNCH.split(), "--dynamo_backend", "no"]


def environment(**more):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    strict = {"PYTHONWARNINGS": "error,ignore::ResourceWarning"}  # timm leaves pictures open
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **strict, **more}


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def together(*arguments, count=2, **more):
    """Run Python with the same arguments in several processes that find each other; exit status and output of each."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **more}
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment(RANK=str(number), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(count), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        said = [process.communicate(timeout=200) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def ended_well(ends):
    for status, _, err in ends:
        assert status == 0, err


# What every worker has in common


def test_one_process_is_the_identity():
    rows = torch.randn(3, 2)
    assert ALONE.joined(rows) is rows
    assert ALONE.own(7) == slice(0, 7) and ALONE.team(0) is ALONE and ALONE.main
    assert ALONE.told("x") == ["x"]
    with share() as workers:
        assert workers is ALONE
    with pytest.raises(DataError), ALONE.agreed():
        raise DataError("as it is")


@pytest.mark.parametrize("items", [0, 1, 3, 4, 5, 64])
def test_items_are_dealt_out_whole_and_evenly(items):
    crew = [Workers(number, 4) for number in range(4)]
    parts = [list(range(items))[worker.own(items)] for worker in crew]
    assert [item for part in parts for item in part] == list(range(items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all((worker.team(items) is worker) == (items >= 4) for worker in crew)


@pytest.mark.parametrize(
    ("variables", "several", "first"),
    [
        ({}, False, True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, True, False),
        ({"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}, True, False),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, True, True),
    ],
)
def test_a_launcher_says_who_one_is(monkeypatch, variables, several, first):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (launched(), is_main()) == (several, first)


def test_without_accelerate_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(WorkerError, match=r"pip install netclone\[distributed\]"), share():
        pass


@pytest.mark.slow
def test_workers_have_in_common_what_they_should():
    ended_well(together("-c", "import crew; crew.check_primitives()", count=3))


# The same results


def network(name, classes, seed):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=classes).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def samples(count, classes, seed):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return images, torch.arange(count) % classes


def results(workers=ALONE):
    """Everything that is shared, on small networks: tensors by name."""
    source, target = network("test_efficientnet", 6, 1), network("test_resnet", 3, 2)
    new, old = samples(150, 6, 3), samples(30, 3, 4)
    groups = channel_groups(source, new[0][:2])
    found = {}
    for name, options in {
        "local": {"budget": "params", "steps": 12},
        "channels": {"budget": "channels", "steps": 8},
        "taylor": {"method": "taylor"},
    }.items():
        mask = netclone.localize(groups, [new], classes=[1, 4], batch_size=7, workers=workers, **options)
        found |= {f"mask {name} {group}": torch.tensor(flags) for group, flags in mask.kept}
    slimmed = slim_down(groups, mask, None)
    slimmed = refit(slimmed, Samples(*new, "data"), None, workers)
    found |= {f"refit {name}": tensor.clone() for name, tensor in slimmed.graph_module.state_dict().items()}
    distill(
        slimmed.graph_module,
        groups.graph_module,
        Neighbourhoods(new[0], torch.ones(len(new[0]))),
        old[0],
        steps=5,
        loop=Loop(batch_size=9, generator=torch.Generator().manual_seed(5), workers=workers),
    )
    found |= {f"distilled {name}": tensor for name, tensor in slimmed.graph_module.state_dict().items()}
    options = {"classes": [1, 4], "target_data": [old], "epochs": 2, "distill_steps": 3, "batch_size": 15}
    module = netclone.clone(source, target, [new], method="taylor", workers=workers, **options)
    found |= {f"clone {name}": tensor for name, tensor in module.state_dict().items()}
    found["search"] = torch.tensor([candidate.score for candidate in module.spec.search])
    grafted = netclone.inject(target, module, name="birds")
    scores = netclone.evaluate(target, [old], reference=target, batch_size=4, workers=workers)
    found["scores"] = torch.tensor([scores.all, scores.calibration_error, scores.locality_closed])
    found["logits"] = netclone.metrics.evaluating.predict(target, old[0], 4, workers)
    assert netclone.evaluate(grafted, [old], source=source, batch_size=4, workers=workers).samples == 30
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save_results(file):
    with share(patience=100) as workers:
        found = results(workers)
        workers.check_same(list(found.values()), "results")
        if workers.main:
            safetensors.torch.save_file(found, file)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    file = tmp_path / "found.safetensors"
    ended_well(together("-c", f"import test_sharing; test_sharing.save_results({str(file)!r})"))
    alone, shared = results(), safetensors.torch.load_file(file)
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        if name.startswith("mask") or name in ("scores", "logits", "search"):
            assert same_bits(tensor, shared[name]), name
        elif tensor.is_floating_point():  # sums of gradients are rounded in another order
            assert float((tensor - shared[name]).abs().max()) <= 1e-3 * float(tensor.abs().max()) + 1e-5, name


# From the command line

RECORDER = """
import json, os, sys

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".png"):
        kind, path = "read", str(arguments[0])
    elif event == "os.rename" and str(arguments[1]).endswith(".safetensors"):
        kind, path = "written", str(arguments[1])
    else:
        return
    with open(os.environ["NOTES"] + os.environ.get("RANK", ""), "a") as file:
        file.write(json.dumps([kind, path]) + "\\n")

if "NOTES" in os.environ:
    sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Two networks and the pictures of their classes; and what notes the files that a process opens and writes."""
    root = tmp_path_factory.mktemp("birds")
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(RECORDER)
    for name, classes, seed in (("source", 5, 1), ("target", 3, 2)):
        safetensors.torch.save_file(network("test_resnet", classes, seed).state_dict(), root / f"{name}.safetensors")
    numbers = numpy.random.default_rng(0)
    for where, classes, count in (("new", 5, 3), ("old", 3, 3)):
        for name in range(classes):
            (root / where / str(name)).mkdir(parents=True)
            for number in range(count):
                pixels = (numbers.random((24, 20, 3)) * 255).astype("uint8")
                Image.fromarray(pixels).save(root / where / str(name) / f"{number}.png")
    return root


def command(birds, out, *more):
    models = [f"timm/test_resnet@{birds / name}.safetensors" for name in ("source", "target")]
    arguments = ["clone", *models, "--classes", "1,3", "--data", birds / "new", "--target-data", birds / "old"]
    options = ["--out", out, "--at", "layer3", "--batch-size", "4", "--epochs", "2", "--distill-steps", "3"]
    return [str(argument) for argument in ("-m", "netclone", *arguments, *options, *more)]


def noting(birds, tmp_path):
    path = os.pathsep.join([str(birds / "hook"), environment()["PYTHONPATH"]])
    return {"NOTES": str(tmp_path / "notes"), "PYTHONPATH": path}


def noted(tmp_path, kind, rank=""):
    file = tmp_path / f"notes{rank}"
    lines = file.read_text().splitlines() if file.exists() else []
    return [path for what, path in map(json.loads, lines) if what == kind]


@pytest.fixture(scope="module")
def alone(birds):
    """The clone that one process makes."""
    out = birds / "alone.safetensors"
    done = CliRunner().invoke(app, command(birds, out)[2:])
    assert done.exit_code == 0, done.output
    return netclone.load(out)


@pytest.fixture(scope="module")
def shared(birds, tmp_path_factory):
    """The file of the clone that two processes make, what they printed, and where their notes are."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "out").mkdir()
    out = folder / "out" / "shared.safetensors"
    run = [sys.executable, *LAUNCH, "--main_process_port", free_port(), *command(birds, out, "--json")]
    done = subprocess.run(run, env=environment(**noting(birds, folder)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, folder


@pytest.mark.long
def test_accelerate_launches_two_processes_that_read_each_picture_once_and_write_one_file(birds, alone, shared):
    out, printed, folder = shared
    assert json.loads(printed)["classes"] == [1, 3]  # printed once, or this were not JSON
    module = netclone.load(out)
    assert module.spec.kept == alone.spec.kept
    assert module.spec.search == alone.spec.search and module.scores == alone.scores
    for (name, tensor), other in zip(alone.state_dict().items(), module.state_dict().values(), strict=True):
        assert float((tensor - other).abs().max()) <= 1e-3 * float(tensor.abs().max()) + 1e-5, name
    wanted = [*(birds / "new").glob("[13]/*.png"), *(birds / "old").glob("*/*.png")]
    read = [noted(folder, "read", rank) for rank in "01"]
    assert collections.Counter(read[0] + read[1]) == collections.Counter(map(str, wanted))
    assert abs(len(read[0]) - len(read[1])) <= 4  # of 6 and 9 pictures, in batches of 4
    assert noted(folder, "written", "1") == []
    assert noted(folder, "written", "0") == [str(out)]
    assert list(out.parent.iterdir()) == [out]


# One that is gone


def die(*arguments, **options):
    """Be killed in the place of a function, in the worker that is to be."""
    if os.environ["RANK"] == os.environ["VICTIM"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return FIT(*arguments, **options)


def clone_and_die():
    """The command line, with a worker that is killed when the first position is fitted."""
    searching.fit = die
    app(prog_name="netclone")


@pytest.mark.slow
@pytest.mark.parametrize(("check", "ends"), [("check_what_is_left", [-9, 0]), ("check_signal", [0, 0])])
def test_whoever_is_left_gets_an_error_of_netclone(check, ends):
    assert [status for status, _, _ in together("-c", f"import crew; crew.{check}()")] == ends


@pytest.mark.long
def test_a_killed_worker_ends_the_run_which_goes_on_from_there_to_the_same_clone(birds, shared, tmp_path):
    out = tmp_path / "herons.safetensors"
    arguments = command(birds, out)[2:]
    ends = together("-c", "import test_sharing; test_sharing.clone_and_die()", *arguments, VICTIM="1")
    (status, _, said), (killed, _, _) = ends
    assert (status, killed) == (1, -signal.SIGKILL)
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("Error:")]
    assert "another worker is gone" in line and f"run the same command again to continue from '{out}.part'" in line
    assert [file.name for file in tmp_path.iterdir()] == ["herons.safetensors.part"]
    ends = together(*command(birds, out))
    ended_well(ends)
    assert "localize" not in ends[0][2] and "distil" not in ends[0][2]
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == shared[0].read_bytes()
