"""Networks run in eight threads while one thread injects and one extracts: nothing fails, nothing computes other bits.

    python examples/benchmarks/threads.py [SECONDS [OUT.json]]

Prints (and writes) how many forwards, injections and extractions there were, how many failed, and how many logits
differed from those computed before. Exits with 1 if any did.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import timm
import torch
from torch import Tensor, fx, nn

import netclone

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Small(nn.Module):
    """Two convolutions and a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x).relu()).relu().mean((2, 3)))
        return logits


class Writing(nn.Module):
    """Writes a buffer, and assigns another, in every forward."""

    seen: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2, 9, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.last = self.linear(x).detach()
        logits: Tensor = self.linear(x)
        return logits


class Recurrent(nn.Module):
    """An LSTM and its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        return states[:, -1]


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks of eight kinds, each with an input."""
    found = {
        "convolutions of timm": (timm.create_model("test_resnet", num_classes=4), IMAGES),
        "attention of timm": (timm.create_model("test_vit", num_classes=4, img_size=32), IMAGES),
        "attention of torch": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), TOKENS),
        "LSTM": (Recurrent(), TOKENS),
        "graph": (fx.symbolic_trace(Small(4)), IMAGES),
        "TorchScript": (torch.jit.script(Small(4).eval()), IMAGES),
        "parametrized": (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), IMAGES),
        "writing buffers": (Writing(), TOKENS),
    }
    return {kind: (model.eval(), given) for kind, (model, given) in found.items()}


def run(seconds: float) -> dict[str, object]:
    """Run all threads for so many seconds; counts, and the first failures as text."""
    torch.manual_seed(0)
    before = nn.Module.__call__, nn.Module.__getattr__, torch.Tensor.__getitem__
    counts: Counter[str] = Counter()
    failures: list[str] = []
    lock, over = threading.Lock(), threading.Event()

    def repeat(what: str, step: Callable[[], bool]) -> None:
        done = 0
        while not over.is_set():
            try:
                same = step()
            except Exception as error:  # any at all is what is looked for
                with lock:
                    counts["failures"] += 1
                    failures.append(f"{what}: {type(error).__name__}: {error}")
            else:
                if not same:
                    with lock:
                        counts["other bits"] += 1
                        failures.append(f"{what}: other bits")
                done += 1
        with lock:
            counts[what] += done

    def forwards(model: nn.Module, given: Tensor) -> Callable[[], bool]:
        want = {}
        for mode, context in MODES.items():
            with context():
                model(given), model(given)  # TorchScript optimises itself in its first runs
                want[mode] = model(given).detach().clone()

        def step() -> bool:
            same = True
            for mode, context in MODES.items():
                with context():
                    same &= torch.equal(model(given), want[mode])
            return same

        return step

    source, target = Small(6).eval(), Small(4).eval()
    mask = netclone.localize(source, method="magnitude", keep=0.5, example_inputs=IMAGES)
    module = netclone.extract(source, mask, classes=[2, 3], example_inputs=IMAGES).with_spec(at="input")

    def injects() -> bool:
        with torch.no_grad():
            return torch.equal(netclone.inject(target, module, example_inputs=IMAGES)(IMAGES)[:, :4], target(IMAGES))

    def extracts() -> bool:
        again = netclone.extract(source, mask, classes=[2, 3], example_inputs=IMAGES)
        with torch.no_grad():
            return torch.equal(again(IMAGES), module(IMAGES))

    steps = {f"forward, {kind}": forwards(*pair) for kind, pair in networks().items()}
    steps |= {"inject": injects, "extract": extracts}
    threads = [threading.Thread(target=repeat, args=item) for item in steps.items()]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    restored = (nn.Module.__call__, nn.Module.__getattr__, torch.Tensor.__getitem__) == before
    return {
        "torch": torch.__version__,
        "seconds": seconds,
        "forwards": len(MODES) * sum(count for what, count in counts.items() if what.startswith("forward")),
        "injections": counts["inject"],
        "extractions": counts["extract"],
        "failures": counts["failures"],
        "other_bits": counts["other bits"],
        "torch_restored": restored,
        "first": failures[:5],
    }


if __name__ == "__main__":
    result = run(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
    text = json.dumps(result, indent=2)
    print(text)
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(text + "\n")
    sys.exit(int(bool(result["failures"] or result["other_bits"] or not result["torch_restored"])))
