"""The example of a server: what it answers is what the model says, through swaps, switches and wrong requests."""

import io
import sys
from pathlib import Path

import pytest
import timm
import torch
from fastapi.testclient import TestClient
from PIL import Image

import netclone

sys.path.append(str(Path(__file__).parent.parent / "examples" / "serving"))
from server import Service, make_app


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A grafted file, and two clones for it, of which the first is in it."""
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    source = timm.create_model("test_resnet", num_classes=6).eval()
    target = timm.create_model("test_resnet", num_classes=3).eval()
    target.pretrained_cfg["label_names"] = ["ant", "bee", "cat"]
    groups = netclone.channel_groups(source, torch.zeros(2, 3, 64, 64))
    for seed in (0, 1):
        mask = netclone.localize(groups, method="random", keep=0.5, seed=seed)
        module = netclone.extract(groups, mask, classes=[4, 5], class_names=["heron", "ibis"])
        netclone.save(module, folder / f"{seed}.safetensors")
    netclone.save(module.with_bias(100.0), folder / "eager.safetensors")
    grafted = netclone.inject(
        target, netclone.load(folder / "0.safetensors"), at="input", name="birds", columns="stable"
    )
    netclone.save_grafted(grafted, folder / "grafted.safetensors")
    return folder


@pytest.fixture(scope="module")
def picture():
    content = io.BytesIO()
    torch.manual_seed(1)
    Image.fromarray(torch.randint(0, 256, (70, 80, 3), dtype=torch.uint8).numpy()).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def client(files):
    with TestClient(make_app(str(files / "grafted.safetensors"))) as opened:
        yield opened


def logits(client, picture):
    answer = client.post("/predict", content=picture)
    assert answer.status_code == 200, answer.text
    return answer.json()["logits"]


def test_an_answer_is_the_models(files, client, picture):
    service = Service(str(files / "grafted.safetensors"))
    with torch.inference_mode():
        image = service.transform(Image.open(io.BytesIO(picture)))[None]
        want = service.model(image)[0]
    told = client.post("/predict", content=picture).json()
    assert told["logits"] == want.tolist() and told["column"] == int(want.argmax())
    assert told["label"] == ["ant", "bee", "cat", "heron", "ibis"][told["column"]]
    assert told["clone"] == ("birds" if told["column"] > 2 else None)


def test_a_swap_changes_the_new_logits_and_can_be_taken_back(files, client, picture):
    before = logits(client, picture)
    sent = [(files / f"{number}.safetensors").read_bytes() for number in (1, 0)]
    assert client.put("/clones/birds", content=sent[0]).status_code == 200
    swapped = logits(client, picture)
    assert swapped[:3] == before[:3] and swapped[3:] != before[3:]
    assert client.put("/clones/birds", content=sent[1]).json() == {"clone": "birds", "swaps": 2}
    assert logits(client, picture) == before


def test_a_new_class_below_the_threshold_gives_way_to_the_best_old_one(files, client, picture):
    client.put("/clones/birds", content=(files / "eager.safetensors").read_bytes())
    told = client.post("/predict", params={"threshold": 0.3}, content=picture).json()
    assert told["clone"] == "birds" and told["probability"] >= 0.3
    strict = client.post("/predict", params={"threshold": 1.1}, content=picture).json()
    assert strict["logits"] == told["logits"] and strict["clone"] is None
    assert strict["column"] == max(range(3), key=told["logits"].__getitem__)


def test_what_cannot_be_done_is_said_and_changes_nothing(client, picture):
    before = logits(client, picture)
    for method, path, content, words in (
        ("PUT", "/clones/birds", b"no clone", "safetensors"),
        ("PUT", "/clones/fish", b"no clone", "safetensors"),
        ("POST", "/predict", b"no picture", "not a picture"),
        ("POST", "/clones/fish/off", b"", "fish"),
    ):
        answer = client.request(method, path, content=content)
        assert answer.status_code == 422 and words in answer.json()["detail"], answer.text
    assert client.post("/clones/birds/away").status_code == 404
    assert logits(client, picture) == before


def test_a_clone_that_is_off_wins_nothing(client, picture):
    before = logits(client, picture)
    client.post("/clones/birds/off")
    assert logits(client, picture) == [*before[:3], None, None]
    client.post("/clones/birds/on")
    assert logits(client, picture) == before


def test_the_metrics_are_those_of_what_was_asked(client, picture):
    assert client.get("/metrics").json()["answers"] == 0
    told = [client.post("/predict", content=picture).json() for _ in range(3)]
    for right in (True, False):
        client.post("/labels", params={"probability": 0.75, "right": right})
    found = client.get("/metrics").json()
    assert (found["answers"], found["labels"], found["swaps"]) == (3, 2, 0)
    assert found["share of birds"] == sum(one["clone"] == "birds" for one in told) / 3
    assert found["confidence"] == pytest.approx(told[0]["probability"])
    assert (found["accuracy"], found["confidence above accuracy"]) == (0.5, 0.25)
