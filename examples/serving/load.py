"""10,000 requests to a server whose clone is swapped every second: python examples/serving/load.py [FILE.json]

    pip install fastapi uvicorn

Makes two clones of the same classes and a grafted file, starts the server in a process of its own, and asks it from
several threads, each with a connection of its own: without a swap, with one every second, and without again. An answer
is right if its logits are, to the bit, those of one of the two clones for that picture. Prints a row for each figure,
and exits with 1 if an answer was lost or wrong.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from server import Service

import netclone
from netclone.demo import NEW, OLD, SOURCE, TARGET, load_data, make_network, train_network

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from timing import Row, reported

REQUESTS, CLIENTS, PICTURES, EVERY = 10_000, 4, 64, 1.0
NAME = "digits"


@dataclass
class Answers:
    """What the clients saw: seconds of each answer, those that were neither clone's, and those that never came."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0

    def ms(self, share: float) -> float:
        """The time within which a share of the answers came."""
        return 1000 * statistics.quantiles(self.seconds, n=100)[round(100 * share) - 1]


def made(folder: Path) -> tuple[Path, list[Path], list[bytes]]:
    """A grafted file, the files of two clones for it, and pictures."""
    digits = load_data()
    source, target = make_network(SOURCE, 10, 0), make_network(TARGET, len(OLD), 0)
    images_wanted = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    vars(target)["pretrained_cfg"].update(images_wanted)
    train_network(source, digits.images, digits.labels, 0, epochs=4)
    train_network(target, *digits.training(OLD), 0, epochs=3)
    new, old = [digits.training(NEW)], [digits.training(OLD)]
    files, modules = [], []
    for number in (0, 1):  # the better one is distilled and fitted, the first is neither
        steps, epochs = 40 * number, 8 * number
        modules.append(
            netclone.clone(
                source, target, new, classes=NEW, target_data=old, at="input", distill_steps=steps, epochs=epochs
            )
        )
        files.append(folder / f"clone-{number}.safetensors")
        netclone.save(modules[-1], files[-1])
    grafted = netclone.inject(target, modules[0], name=NAME, columns="stable")
    netclone.save_grafted(grafted, folder / "grafted.safetensors")
    pictures = []
    for image in digits.test_images[:PICTURES]:
        content = io.BytesIO()
        Image.fromarray(((image[0] + 1) * 127.5).clamp(0, 255).byte().numpy()).save(content, "PNG")
        pictures.append(content.getvalue())
    return folder / "grafted.safetensors", files, pictures


def expected(file: Path, clones: list[Path], pictures: list[bytes]) -> list[list[list[float]]]:
    """The logits of every picture with each clone."""
    service, found = Service(str(file)), []
    for clone in clones:
        service.swap(NAME, clone.read_bytes())
        found.append([service.predict(picture)["logits"] for picture in pictures])
    return found


def asked(port: int, pictures: list[bytes], right: list[list[list[float]]], requests: int) -> Answers:
    """Many requests from several threads."""
    answers, lock = Answers(), threading.Lock()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for turn in range(number, requests, CLIENTS):
            picture = turn % len(pictures)
            started = time.perf_counter()
            try:
                connection.request("POST", "/predict", pictures[picture])
                response = connection.getresponse()
                content, status = response.read(), response.status
            except OSError:
                with lock:
                    answers.lost += 1
                connection.close()
                continue
            seconds = time.perf_counter() - started
            logits = json.loads(content).get("logits") if status == 200 else None
            with lock:
                answers.seconds.append(seconds)
                answers.lost += status != 200
                answers.wrong += status == 200 and logits not in [of_clone[picture] for of_clone in right]

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client, range(CLIENTS)))
    return answers


class Swapper(threading.Thread):
    """Sends one clone and the other in turn, again and again, until it is told to stop."""

    def __init__(self, port: int, clones: list[Path]) -> None:
        super().__init__(daemon=True)
        self.port, self.clones = port, clones
        self.over = threading.Event()
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self.over.wait(EVERY):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            content = self.clones[len(self.seconds) % 2].read_bytes()
            started = time.perf_counter()
            connection.request("PUT", f"/clones/{NAME}", content)
            response = connection.getresponse()
            told = response.read()
            if response.status != 200:
                raise RuntimeError(told.decode())
            self.seconds.append(time.perf_counter() - started)
            connection.close()


def started(file: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The server, once it answers, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "--port", str(port)]
    environment = {**os.environ, "NETCLONE_MODEL": str(file), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*command, "--log-level", "warning", "server:app"], env=environment)
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server, port
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server ended with {server.returncode}")


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file, clones, pictures = made(Path(folder))
        right = expected(file, clones, pictures)
        differ = sum(one != other for one, other in zip(*right, strict=True))
        server, port = started(file)
        try:
            asked(port, pictures, right, 200)  # to warm up
            before = asked(port, pictures, right, REQUESTS // 4)
            swapper = Swapper(port, clones[::-1])
            swapper.start()
            during = asked(port, pictures, right, REQUESTS // 2)
            swapper.over.set()
            swapper.join()
            after = asked(port, pictures, right, REQUESTS // 4)
        finally:
            server.terminate()
            server.wait()
    rows: list[Row] = [("pictures with other logits after a swap", differ, None)]
    rows += [("requests", sum(len(part.seconds) + part.lost for part in (before, during, after)), None)]
    rows += [
        ("swaps", len(swapper.seconds), None),
        ("a swap, median, ms", 1000 * statistics.median(swapper.seconds), None),
    ]
    for words, part in (("before", before), ("during", during), ("after", after)):
        rows += [(f"{words}: an answer, median, ms", part.ms(0.5), None), (f"{words}: p99, ms", part.ms(0.99), None)]
        rows += [(f"{words}: lost", part.lost, 0), (f"{words}: wrong", part.wrong, 0)]
    return reported(rows)


if __name__ == "__main__":
    raise SystemExit(main())
