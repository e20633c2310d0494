"""The report: its figures are those of evaluate, it is safe and small, and it works in a real browser."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timm
import torch
from browsing import Page, open_page
from torch import Tensor, fx, nn

import netclone
from netclone.files.spec import Gate
from netclone.graph.tracing import same_bits
from netclone.learning.routing import Router
from netclone.reporting.page import MOST_BYTES, MOST_CLASSES, MOST_CONFUSED, Report, page, report
from netclone.reporting.rendering import percent

OLD = ["zero", "one & only", "<two>", "three", "four"]
NEW = ["<script>alert(5)</script>", 'six"', "seven"]
COMMANDS = ["netclone inject a.safetensors b.safetensors > 'c'", "<img src=x onerror=alert(1)>"]


class Tables(HTMLParser):
    """The cells of a page's tables with an id, as text, by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self._rows: list[list[str]] | None = None
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "table":
            self._rows = self.found.setdefault(str(dict(attrs)["id"]), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and self._rows:
            self._rows[-1][-1] += data


class Made:
    """A target, a source, a clone of three classes, and labelled images."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.target = timm.create_model("test_resnet", num_classes=5).eval()
        self.source = timm.create_model("test_efficientnet", num_classes=8).eval()
        images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 8
        self.module = netclone.clone(
            self.source,
            self.target,
            [(images, labels)],
            classes=[5, 6, 7],
            class_names=NEW,
            target_data=[(images, labels % 5)],
            at="layer2",
            source_at="blocks.2",
            method="taylor",
            distill_steps=2,
            epochs=1,
        )
        tried = (
            netclone.Candidate("layer3", "blocks.3", 0.25),
            netclone.Candidate("layer4", "<blocks.4>", None, "no <adapter> fits"),
            netclone.Candidate("layer2", "blocks.2", 0.75),
        )
        self.grafted = netclone.inject(self.target, self.module.with_spec(search=tried), name="digits")
        self.data = [(torch.randn(40, 3, 32, 32), torch.arange(40) % 8)]


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.fixture(scope="module")
def written(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("report") / "digits.html"
    given = {"old_names": OLD, "source": made.source, "commands": COMMANDS}
    return report(made.grafted, made.data, path, title="</title><script>alert(2)</script>", **given)


@pytest.fixture(scope="module")
def text(written: Report) -> str:
    return written.path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with open_page(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


# Figures


def test_figures_are_those_of_evaluate(made: Made, written: Report, text: str) -> None:
    scores = written.score_of
    want = netclone.evaluate(made.grafted, made.data, reference=made.target, source=made.source)
    assert scores["grafted"] == want and want.new_source is not None
    removed = netclone.evaluate(netclone.remove(made.grafted), made.data, old=range(5), new=range(5, 8))
    assert scores["before"] == scores["removed"] == removed
    rows = {name: cells for name, *cells in Tables(text).found["scores"][1:]}
    assert rows.pop("source")[1] == percent(want.new_source)
    made_with = made.module.scores
    assert rows.pop("held out")[:2] == [percent(made_with["old"]), percent(made_with["new"])]
    for name, cells in rows.items():
        got = scores[name]
        assert cells[:4] == [percent(got.old), percent(got.new), percent(got.all), percent(got.locality_open)]
        assert cells[5] == percent(got.calibration_error)
    assert f"<strong>{scores['grafted'].similarity:.3f}</strong>" in text


def test_classes_have_recall_precision_and_that_of_the_source(made: Made, written: Report, text: str) -> None:
    images, labels = made.data[0]
    with torch.no_grad():
        taken, known = made.grafted.eval()(images).argmax(1), made.source(images).argmax(1)
    head, *rows = Tables(text).found["classes"]
    assert head[3:] == ["recall before", "recall", "change", "precision", "source’s recall"]  # noqa: RUF001
    for one, row in zip(written.classes, rows, strict=True):
        own, as_it = labels == one.column, taken == one.column
        assert one.grafted == pytest.approx(float((taken[own] == one.column).double().mean()))
        precision = float(own[as_it].double().mean()) if as_it.any() else None
        source = float((known[own] == one.column).double().mean()) if one.is_new else None
        assert (one.precision, one.source) == (pytest.approx(precision), pytest.approx(source))
        assert (row[4], row[6], row[7]) == (percent(one.grafted), percent(precision), percent(source))


@pytest.mark.parametrize(("bias", "said"), [(0.0, True), (0.5, False)])
def test_held_out_figures_far_from_these_are_said(made: Made, tmp_path: Path, bias: float, said: bool) -> None:
    """A bias moves the accuracies, so with one there is nothing to compare them with."""
    module = made.module.with_spec(scores=(("old", -1.0), ("new", made.module.scores["new"])), bias=bias)
    found = report(netclone.inject(made.target, module, name="digits"), made.data, tmp_path / "far.html")
    text = found.path.read_text(encoding="utf-8")
    assert ("Old classes: -100.0% on images held out when the clone was made, " in text) is said
    assert ("held out" in [row[0] for row in Tables(text).found["scores"]]) is said
    assert ("are far apart" in text) is said


def test_costs_are_those_of_the_networks(made: Made, written: Report, text: str) -> None:
    parameters = {
        "target": sum(p.numel() for p in made.target.parameters()),
        "grafted": sum(p.numel() for p in made.grafted.parameters()),
        "clone": sum(p.numel() for p in made.module.parameters()),
        "source": sum(p.numel() for p in made.source.parameters()),
    }
    assert {name: cost.parameters for name, cost in written.costs} == parameters
    image = made.data[0][0][:1]
    assert written.cost_of["grafted"].macs == netclone.cost(made.grafted, image, repeats=1).macs
    assert all(cost.latency_ms > 0 for _, cost in written.costs)
    for name, shown, *_ in Tables(text).found["costs"][1:]:
        assert shown == f"{parameters[name]:,}"


def test_the_clone_as_it_is_is_a_dot_on_the_curve_of_its_bias(made: Made, text: str) -> None:
    scores = netclone.evaluate(made.grafted, made.data)
    present = netclone.trade_off(made.grafted, made.data).present
    assert (present.old, present.new) == (scores.old, scores.new)
    dot = f'cx="{40 + 290 * present.new:.1f}" cy="{300 - 290 * present.old:.1f}"'
    assert dot in text and [row[0] for row in Tables(text).found["mistakes"]][1:] == ["0.2", "1", "5", "as it is"]


def test_a_clone_that_is_off_has_no_page(made: Made, tmp_path: Path) -> None:
    with netclone.disabled(made.grafted), pytest.raises(netclone.ArgumentError, match="is off; switch it on"):
        report(made.grafted, made.data, tmp_path / "off.html")
    assert not list(tmp_path.iterdir())


def test_a_gate_is_a_dot_on_its_curve(made: Made, text: str, tmp_path: Path) -> None:
    router = Router([(96,)], torch.randn(96, generator=torch.Generator().manual_seed(0)), torch.zeros(()))
    spec = replace(made.module.spec, gate=Gate((("global_pool_flatten", (96,)),), 0.5, 0.1))
    grafted = netclone.inject(made.target, netclone.CloneModule(made.module.body, spec, router), name="digits")
    images, labels = made.data[0]
    score = router(made.target.forward_head(made.target.forward_features(images), pre_logits=True))
    router.bias -= float(score[labels < 5].detach().median()) - 1e-4  # of 25 old images the lower 12 are skipped
    grafted.get_submodule("digits.router").bias.copy_(router.bias)

    found = report(grafted, made.data, tmp_path / "gated.html")
    page_text = found.path.read_text(encoding="utf-8")
    scores = netclone.evaluate(grafted, made.data)
    assert found.gate is not None and found.gate.skipped_old == pytest.approx(12 / 25)
    assert found.gate.skipped_old == pytest.approx(1 - scores.sent_old)
    assert found.gate.mean == pytest.approx((scores.old + scores.new) / 2)
    assert found.score_of["grafted"].sent_new == scores.sent_new
    assert found.cost_of["grafted"].macs == netclone.cost(made.grafted, images[:1], repeats=1).macs
    assert page_text.count("<polyline class=") - page_text.count('<polyline class="edge') == 3 + 1
    assert "<h2>The gate</h2>" in page_text and "<h2>The gate</h2>" not in text


def test_removal_is_checked_bit_by_bit_and_the_truth_told(
    made: Made, written: Report, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert written.compared == 40 * 5
    assert written.differing == 0
    assert "are the same to the last bit" in text

    def remove(grafted: fx.GraphModule, name: str | None = None) -> fx.GraphModule:
        result = netclone.remove(grafted, name)
        with torch.no_grad():
            result.get_submodule("fc").bias[1] += 1
        return result

    monkeypatch.setattr("netclone.reporting.page.remove", remove)
    wrong = report(made.grafted, made.data, tmp_path / "wrong.html")
    assert wrong.differing == 40
    said = wrong.path.read_text(encoding="utf-8")
    assert "40 of 200 logits differ." in said
    assert "are the same to the last bit" not in said


def test_says_what_was_cloned_and_what_was_tried(written: Report, text: str) -> None:
    tables = Tables(text).found
    kept = {row[0]: (int(row[2]), int(row[3])) for row in tables["layers"][1:]}
    assert kept == {row.label: (row.kept, row.total) for row in written.layers}
    assert kept["conv_stem"] == (0, 24)  # before the cut
    outcomes = {row[0]: row[-1] for row in tables["search"][1:]}
    assert outcomes == {
        "layer3": "rejected: 50.0 points below the best",
        "layer4": "rejected: no <adapter> fits",
        "layer2": "chosen",
    }


def test_confusion_adds_up(written: Report, text: str) -> None:
    counts = torch.tensor(written.confusion.counts)
    assert counts.sum() == 40
    assert counts.diag().sum() / 40 == pytest.approx(written.score_of["grafted"].all)
    shown = [[int(cell or 0) for cell in row[1:]] for row in Tables(text).found["confusion"][1:]]
    assert shown == counts.tolist()


def test_helped_are_new_and_hurt_old_sorted_by_what_changed(made: Made, written: Report, text: str) -> None:
    images = made.data[0][0]
    with torch.no_grad():
        logits, left = made.grafted(images), netclone.remove(made.grafted)(images)
    likely = logits.double().softmax(1)
    gains = [picture.change.gain for picture in written.helped]
    assert gains == sorted(gains, reverse=True) and 0 < len(gains) <= 12
    for picture in written.helped:
        change = picture.change
        assert change.label in (5, 6, 7)
        assert change.before == 0
        assert change.grafted == pytest.approx(float(likely[change.index, change.label]), abs=1e-5)
    losses = [picture.change.gain for picture in written.hurt]
    assert losses == sorted(losses) and losses[-1] < 0 and len(losses) <= 12
    before = left.double().softmax(1)
    for picture in written.hurt:
        change = picture.change
        assert change.label < 5
        lost = float(likely[change.index, change.label] - before[change.index, change.label])
        assert change.gain == pytest.approx(lost, abs=1e-5)
    assert text.count('<img src="data:image/png;base64,') == len(written.helped) + len(written.hurt)


def test_a_clone_between_others(made: Made, tmp_path: Path) -> None:
    """Its columns lie between those of the target and another clone's, which counts as old."""
    second = made.module.with_spec(class_names=("x", "y", "z"))
    both = netclone.inject(made.grafted, second, name="second")
    images, labels = made.data[0]
    data = [(images, torch.where(labels == 0, 8 + torch.arange(40) % 3, labels))]
    found = report(both, data, tmp_path / "two.html", name="digits", source=made.source)
    assert found.new == (5, 6, 7)
    assert found.old == (0, 1, 2, 3, 4, 8, 9, 10)
    assert found.labels == ("0", "1", "2", "3", "4", *NEW, "x", "y", "z")
    assert found.differing == 0 and found.compared == 40 * 8
    want = netclone.evaluate(both, data, old=found.old, new=found.new, source=made.source, name="digits")
    own = {"locality_closed": None, "old_before": None}  # against the target's own logits, which evaluate was not given
    assert replace(found.score_of["grafted"], **own) == want
    assert found.score_of["grafted"].locality_closed == 0
    left = netclone.remove(both, "digits")(images).argmax(1)  # columns 5, 6 and 7 are the second clone's now
    right = left == torch.where(data[0][1] >= 8, data[0][1] - 3, torch.where(data[0][1] >= 5, -1, data[0][1]))
    assert found.score_of["removed"].all == pytest.approx(float(right.double().mean()))
    assert found.score_of["removed"] == found.score_of["before"]


def test_what_is_not_there_is_said(made: Made, tmp_path: Path) -> None:
    """No new sample, no old name, no source, no search, no command: still a page."""
    plain = netclone.inject(made.target, made.module.with_spec(search=()), name="digits")
    images = torch.randn(6, 3, 32, 32)
    found = report(plain, [(images, torch.arange(6) % 5)], tmp_path / "plain.html")
    said = found.path.read_text(encoding="utf-8")
    assert found.score_of["grafted"].new is None and not found.helped
    for words in ("no samples", "No position was searched", "No commands were given", "No image of a new class"):
        assert words in said
    assert "Similarity" not in said


def test_the_same_twice_but_for_date_and_latency(made: Made, written: Report, tmp_path: Path) -> None:
    given = {"old_names": OLD, "source": made.source, "commands": COMMANDS}
    again = report(made.grafted, made.data, tmp_path / "again.html", title=written.title, **given)

    def steady(found: Report) -> str:
        costs = tuple((name, replace(cost, latency_ms=0.0)) for name, cost in found.costs)
        return page(replace(found, costs=costs, date=""))

    assert steady(again) == steady(written)


def test_models_are_untouched(made: Made, tmp_path: Path) -> None:
    grafted, source = copy.deepcopy(made.grafted).train(), copy.deepcopy(made.source).train()
    kept = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (grafted, source)]
    modes = [[part.training for part in model.modules()] for model in (grafted, source)]
    flags = [[p.requires_grad for p in model.parameters()] for model in (grafted, source)]
    code, state = grafted.code, torch.random.get_rng_state()
    report(grafted, made.data, tmp_path / "page.html", source=source)
    for model, tensors in zip((grafted, source), kept, strict=True):
        assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in tensors.items())
    assert [[part.training for part in model.modules()] for model in (grafted, source)] == modes
    assert [[p.requires_grad for p in model.parameters()] for model in (grafted, source)] == flags
    assert grafted.code == code and torch.equal(state, torch.random.get_rng_state())


def test_tells_how_far_it_is(made: Made, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report(made.grafted, made.data, tmp_path / "page.html", progress=lambda *step: told.append(step))
    assert {what for what, _, _ in told} == {"report"}
    assert [done for _, done, _ in told] == list(range(told[0][2] + 1))


# The page as a file


def test_everything_given_is_escaped(written: Report, text: str) -> None:
    for raw in ("<script>alert", "<two>", "<img src=x", "<blocks.4>", "<adapter>"):
        assert raw not in text
    assert Tables(text).tags.count("script") == 1
    assert "netclone inject a.safetensors b.safetensors &gt; &#39;c&#39;" in text
    assert "<title>&lt;/title&gt;" in text


def test_allows_no_network_and_one_script_only(text: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy and policy[1].startswith("default-src 'none'; img-src data:")
    assert re.search(r"script-src 'sha256-[\w+/]+='", policy[1]) and "unsafe-eval" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\((?!#)|@import", text)


def test_says_how_to_get_it_again(text: str) -> None:
    for version in (netclone.__version__, torch.__version__, timm.__version__):
        assert f"<dd>{version}</dd>" in text


class Wide(nn.Module):
    """A network of one convolution and very many classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.fc = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.flat(self.pool(self.act(self.stem(images)))))


def test_small_with_a_thousand_classes_and_large_images(tmp_path: Path) -> None:
    example = torch.zeros(2, 3, 128, 128)
    source, target = Wide(40), Wide(1000).eval()
    mask = netclone.localize(source, method="magnitude", example_inputs=example)
    module = netclone.extract(
        source, mask, classes=range(40), class_names=[f"{c:n>500}" for c in range(40)], example_inputs=example
    )
    grafted = netclone.inject(target, module, at="input", name="many", example_inputs=example)
    data = [(torch.rand(1040, 3, 128, 128), torch.arange(1040))]
    found = report(grafted, data, tmp_path / "wide.html", old_names=[f"{i} <{'o' * 500}>" for i in range(1000)])
    assert found.bytes == found.path.stat().st_size < MOST_BYTES == 2_000_000
    assert len(found.confusion.columns) == 2 * MOST_CONFUSED and found.confusion.others == 1040 - 2 * MOST_CONFUSED
    assert sum(map(sum, found.confusion.counts)) == 1040
    assert len(found.classes) == MOST_CLASSES and found.classes_seen == 1040
    assert all(picture.uri.startswith("data:image/jpeg") for picture in found.helped)
    said = found.path.read_text(encoding="utf-8")
    assert f"sum over the other {1040 - 2 * MOST_CONFUSED}" in said and "The 200 of 1040 classes" in said


def test_refuses_to_write_a_page_that_is_too_large(made: Made, tmp_path: Path) -> None:
    with pytest.raises(netclone.ArgumentError, match="less than 2,000,000; give shorter commands"):
        report(made.grafted, made.data, tmp_path / "large.html", commands=["x" * 2_000_000])
    assert not list(tmp_path.iterdir())


# What it refuses


def test_refuses_with_the_way_out_and_leaves_nothing(made: Made, tmp_path: Path) -> None:
    there = tmp_path / "page.html"
    images, labels = made.data[0]
    with pytest.warns(netclone.SameNameWarning):
        both = netclone.inject(made.grafted, made.module, name="second", allow_same_names=True)
    with pytest.raises(netclone.CloneNameError, match="did you mean 'digits'"):
        report(made.grafted, made.data, there, name="digit")
    with pytest.raises(netclone.CloneNameError, match="say which one"):
        report(both, made.data, there)
    with pytest.raises(netclone.ArgumentError, match="holds no clones"):
        report(netclone.remove(made.grafted), made.data, there)
    with pytest.raises(netclone.ArgumentError, match="old_names: 2 names for the 5 columns"):
        report(made.grafted, made.data, there, old_names=["a", "b"])
    with pytest.raises(netclone.ArgumentError, match="pixels: returned .*expected RGB"):
        report(made.grafted, made.data, there, pixels=lambda batch: batch[0])
    with pytest.raises(netclone.DataError, match="label 8 is neither old"):
        report(made.grafted, [(images, labels + 1)], there)
    with pytest.raises(netclone.ArchiveError, match="there is no folder"):
        report(made.grafted, made.data, tmp_path / "none" / "page.html")
    with pytest.raises(netclone.ArchiveError, match="cannot write"):
        report(made.grafted, made.data, tmp_path)
    assert not list(tmp_path.iterdir())


# In a browser

SIZES = [(1280, 900), (390, 844)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("dark", [False, True])
def test_opens_with_no_error_no_request_and_nothing_cut_off(
    browser: Page, written: Report, width: int, height: int, dark: bool, tmp_path: Path
) -> None:
    browser.visit(written.path, width, height, dark)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [written.path.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    tables = "[...document.querySelectorAll('.scroll')]"
    assert browser.run(f"{tables}.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)") == []
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.run("document.title") == written.title
    brightness = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert brightness < 50 if dark else brightness > 200
    assert browser.picture(tmp_path / "page.png").stat().st_size > 10_000


def test_errors_would_be_seen(browser: Page, written: Report, text: str, tmp_path: Path) -> None:
    """The test above can fail: what a page does wrong, or its policy forbids, is an error to the browser."""
    other = tmp_path / "other.html"
    other.write_text(text.replace("</body>", "<script>nothing()</script><img src=http://127.0.0.1:9/x></body>"))
    browser.visit(other)
    assert any("script" in error and "Content Security Policy" in error for error in browser.errors)
    assert any("http://127.0.0.1:9/x" in error for error in browser.errors)
    other.write_text(re.sub("script-src '[^']+'", "script-src 'unsafe-inline'", text).replace("reset();", "missing();"))
    browser.visit(other)
    assert any("missing is not defined" in error for error in browser.errors)


def _seen(browser: Page) -> tuple[float, float, float]:
    """Left, top and width of the part of the graph that is seen."""
    left, top, width, _ = map(float, browser.run("document.getElementById('graph').getAttribute('viewBox')").split())
    return left, top, width


def test_the_graph_zooms_and_moves(browser: Page, written: Report) -> None:
    browser.visit(written.path)
    full = _seen(browser)
    browser.press("#zoom-in")
    assert _seen(browser)[2] == pytest.approx(full[2] / 1.5)
    browser.press("#zoom-out")
    assert _seen(browser) == pytest.approx(full)
    browser.press("#zoom-in")
    browser.press("#zoom-reset")
    assert _seen(browser) == pytest.approx(full)

    browser.wheel("#graph-frame", -300)
    near = _seen(browser)
    assert near[2] < full[2]
    browser.drag("#graph-frame", -40, -30)
    moved = _seen(browser)
    assert moved[0] > near[0] and moved[1] > near[1] and moved[2] == near[2]

    browser.run("document.getElementById('graph-frame').focus()")
    browser.key("0")
    assert _seen(browser) == pytest.approx(full)
    browser.key("+")
    browser.key("ArrowRight")
    closer = _seen(browser)
    assert closer[2] < full[2] and closer[0] > 0
    browser.key("-")
    assert _seen(browser)[2] == pytest.approx(full[2])
    for _ in range(20):
        browser.key("+")
    assert _seen(browser)[2] == pytest.approx(full[2] / 8, rel=0.01)
    assert browser.errors == []


def test_the_wheel_scrolls_the_page_where_the_graph_is_at_its_limit(browser: Page, written: Report) -> None:
    browser.visit(written.path)
    browser.middle("#graph-frame")
    before, full = browser.run("scrollY"), _seen(browser)
    browser.wheel("#graph-frame", 200)
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert _seen(browser) == pytest.approx(full)
    assert browser.run("scrollY") > before


def test_two_fingers_zoom_on_a_phone(browser: Page, written: Report) -> None:
    browser.visit(written.path, 390, 844)
    full = _seen(browser)
    browser.pinch("#graph-frame", 60, 180)
    near = _seen(browser)
    assert near[2] == pytest.approx(full[2] / 3, rel=0.2)
    browser.pinch("#graph-frame", 200, 60)
    assert _seen(browser)[2] > near[2]


def test_the_tables_sort(browser: Page, written: Report) -> None:
    browser.visit(written.path)

    def column(table: str, index: int) -> list[str]:
        return browser.run(
            f"[...document.querySelectorAll('#{table} tbody tr')].map(row => "
            f"row.cells[{index}].dataset.value ?? row.cells[{index}].textContent)"
        )

    def head(table: str, index: int) -> str:
        return f"#{table} thead th:nth-child({index + 1}) button"

    for table, index in (("layers", 2), ("layers", 1), ("classes", 3), ("costs", 1), ("search", 2)):
        values = [float(value) for value in column(table, index)]
        assert len(set(values)) > 1 or table == "classes"
        browser.press(head(table, index))
        assert [float(value) for value in column(table, index)] == sorted(values)
        browser.press(head(table, index))
        assert [float(value) for value in column(table, index)] == sorted(values, reverse=True)
        sorts = f"document.querySelector('#{table} thead th:nth-child({index + 1})').ariaSort"
        assert browser.run(sorts) == "descending"
    browser.press(head("classes", 1))
    assert column("classes", 1) == sorted(OLD + NEW)
    assert browser.errors == []
