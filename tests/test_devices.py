"""Networks and data on a device that is not the CPU, and are moved there by name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from netclone.errors import ArgumentError
from netclone.graph.modes import QUICK
from netclone.runtime.devices import device_named, model_on, on_device

HERE = Path(__file__).parent


def run(code_or_file: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *code_or_file], capture_output=True, text=True, cwd=HERE, timeout=900
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("test_efficientnet", "test_resnet"),
        pytest.param("test_resnet", "test_vit", marks=pytest.mark.long),
    ],
)
def test_the_whole_pipeline_runs_on_a_device_that_refuses_to_mix_with_the_cpu(
    source: str, target: str, tmp_path: Path
) -> None:
    """A batch, index or generator's draw that is left on the CPU fails there."""
    done = run(["whole_pipeline.py", "strict", source, target, str(tmp_path)])
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize("which", ["methods", "modules"])
def test_every_method_of_the_benchmarks_runs_on_such_a_device(which: str, tmp_path: Path) -> None:
    done = run(["whole_benchmark.py", "strict", which, str(tmp_path)])
    assert done.returncode == 0 and done.stdout == "done\n", done.stdout + done.stderr[-2000:]


ZOO = """
import strict_device
from netclone.graph.modes import QUICK
from netclone.zoo import check
strict_device.register()
row = check("timm/test_resnet", device="strict", modes=QUICK)
print(row.passed, row.target.modes, row.target.reason, row.source.reason)
"""


def test_the_zoo_checks_a_network_on_such_a_device() -> None:
    done = run(["-c", ZOO])
    assert done.stdout == f"True {len(QUICK)}  \n", done.stdout + done.stderr[-2000:]


FORGOTTEN = """
import strict_device, torch
strict_device.register()
images = torch.randn(4, 3, 8, 8).to("strict")
turned = torch.rand(4) < 0.5
assert torch.equal((images + 1).cpu(), images.cpu() + 1)
for name, mixed in {
    "where": lambda: torch.where(turned[:, None, None, None], images.flip(3), images),
    "index": lambda: images[torch.tensor([0, 1])],
    "add": lambda: images + torch.randn(3, 1, 1),
    "conv": lambda: torch.nn.Conv2d(3, 2, 1)(images),
    "draw": lambda: images.normal_(generator=torch.Generator()),
    "cat": lambda: torch.cat([images, torch.zeros(1, 3, 8, 8)]),
}.items():
    try:
        mixed()
    except RuntimeError as error:
        print(name, "same device" in str(error))
"""


def test_the_device_of_the_tests_finds_what_is_left_on_the_cpu() -> None:
    done = run(["-c", FORGOTTEN])
    assert done.stdout.split("\n")[:-1] == [
        "where True",
        "index True",
        "add True",
        "conv True",
        "draw True",
        "cat True",
    ], done.stderr


def test_a_device_is_known_by_its_name() -> None:
    assert device_named(None) is None
    assert device_named("cpu") == device_named(torch.device("cpu")) == torch.device("cpu")
    assert device_named("auto") == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


@pytest.mark.parametrize("name", ["gpu", "", 3.5, "strict", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(name: object) -> None:
    with pytest.raises(ArgumentError, match="device: .*expected 'auto', 'cpu'"):
        device_named(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["meta", "auto"])
def test_a_device_without_float64_is_refused_or_passed_over(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = torch.empty

    def empty(*size: int, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        if torch.device(str(device)).type == "meta" and dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return real(*size, device=device, dtype=dtype)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    if name == "auto":
        assert device_named(name) == torch.device("cpu")
        return
    with pytest.raises(ArgumentError, match="Cannot convert .* with float64"):
        device_named(name)


def test_a_model_is_copied_only_where_it_has_to_be_moved() -> None:
    model = nn.Linear(2, 2)
    assert model_on(model, None) is model and model_on(model, torch.device("cpu")) is model
    moved = model_on(model, torch.device("meta"))
    assert moved.weight.is_meta and not model.weight.is_meta
    inputs = torch.zeros(1)
    assert on_device(inputs, torch.device("meta")).is_meta and on_device((inputs,), torch.device("meta"))[0].is_meta
    assert on_device(None, torch.device("meta")) is None
