"""A grafted classifier behind FastAPI, whose clones are swapped and switched while it answers.

    pip install fastapi uvicorn
    NETCLONE_MODEL=grafted.safetensors uvicorn --app-dir examples/serving server:app

    curl --data-binary @heron.jpg localhost:8000/predict
    curl -X PUT --data-binary @better.safetensors localhost:8000/clones/herons
    curl -X POST localhost:8000/clones/herons/off
    curl localhost:8000/metrics

The model comes from `netclone inject` or `netclone.save_grafted`. A clone that is sent has the classes of the one that
it replaces (`netclone.replace`). Requests that are answered meanwhile see all of the old clone or all of the new one.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import timm.data
import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from PIL import Image

import netclone

WINDOW = 1000  # answers, and labels that came back, over which /metrics looks


class Service:
    """A grafted model, and what it has answered lately."""

    def __init__(self, file: str) -> None:
        model = netclone.load_model(file).eval()
        if not isinstance(model, netclone.GraftedModule):
            raise SystemExit(f"{file} holds no clones; write it with netclone inject")
        self.model: netclone.GraftedModule = model
        config = timm.data.resolve_model_data_config(self.model)
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        self.transform = timm.data.create_transform(**config)
        self.answered: deque[tuple[str | None, float]] = deque(maxlen=WINDOW)
        self.checked: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self.swaps = 0

    def predict(self, content: bytes, threshold: float = 0.0) -> dict[str, Any]:
        """What a picture shows; the best old class, if a new one is less probable than the threshold."""
        try:
            image = self.transform(Image.open(io.BytesIO(content)).convert(self.mode))
        except OSError as error:
            raise HTTPException(422, f"not a picture: {error}") from error
        with torch.inference_mode():
            logits = self.model(image[None])[0]
        probabilities = logits.softmax(0)
        column = int(probabilities.argmax())
        clone = self.clone_of(column)
        if clone is not None and float(probabilities[column]) < threshold:
            column = int(logits[: self.old].argmax())  # whose probabilities may all be 0
            clone = None
        confidence = float(probabilities[column])
        self.answered.append((clone, confidence))
        name = self.model.label_names[column]
        return {"column": column, "label": name, "probability": confidence, "clone": clone, "logits": logits.tolist()}

    @property
    def old(self) -> int:
        """The number of the target's own columns."""
        return min(columns.start for columns in self.model.columns.values())

    def clone_of(self, column: int) -> str | None:
        """The clone that a column belongs to; None for one of the target's."""
        return next((name for name, columns in self.model.columns.items() if column in columns), None)

    def swap(self, name: str, content: bytes) -> dict[str, Any]:
        """Put the clone in a file in the place of the one with that name, for every request from now on."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "clone.safetensors")
            file.write_bytes(content)
            netclone.replace(self.model, name, netclone.load(file))
        self.swaps += 1
        return {"clone": name, "swaps": self.swaps}

    def metrics(self) -> dict[str, Any]:
        """How often each clone won lately, and how far confidence and accuracy are apart, if labels came back."""
        answered, checked = list(self.answered), list(self.checked)
        found: dict[str, Any] = {"answers": len(answered), "labels": len(checked), "swaps": self.swaps}
        for name in self.model.columns:
            found[f"share of {name}"] = sum(clone == name for clone, _ in answered) / max(1, len(answered))
        found["confidence"] = sum(confidence for _, confidence in answered) / max(1, len(answered))
        if checked:
            found["accuracy"] = sum(right for _, right in checked) / len(checked)
            found["confidence above accuracy"] = sum(confidence - right for confidence, right in checked) / len(checked)
        return found


def make_app(file: str) -> FastAPI:
    """The application around a grafted file."""
    app, service = FastAPI(title="netclone"), Service(file)

    @app.post("/predict")
    async def predict(request: Request, threshold: float = 0.0) -> dict[str, Any]:
        return await run_in_threadpool(service.predict, await request.body(), threshold)

    @app.post("/labels")
    def label(probability: float, right: bool) -> None:
        """Whether an answer of that probability was right, once that is known."""
        service.checked.append((probability, right))

    @app.put("/clones/{name}")
    async def swap(name: str, request: Request) -> dict[str, Any]:
        try:
            return await run_in_threadpool(service.swap, name, await request.body())
        except netclone.NetcloneError as error:
            raise HTTPException(422, str(error)) from error

    @app.post("/clones/{name}/{state}")
    def switch(name: str, state: str) -> dict[str, Any]:
        verbs = {"on": netclone.enable, "off": netclone.disable}
        if state not in verbs:
            raise HTTPException(404, f"state: got {state!r}, expected 'on' or 'off'")
        try:
            verbs[state](service.model, name)
        except netclone.NetcloneError as error:
            raise HTTPException(422, str(error)) from error
        return {"clone": name, "state": state}

    @app.get("/metrics")
    def metrics() -> dict[str, Any]:
        return service.metrics()

    return app


if "NETCLONE_MODEL" in os.environ:
    app = make_app(os.environ["NETCLONE_MODEL"])
