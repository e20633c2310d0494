"""One bias per clone: what it computes, where it is kept, and the curve to choose it by."""

import copy

import pytest
import torch
from test_switching import HERONS, extracted, run, two

import netclone
from netclone.cloning.switching import disable, replace
from netclone.errors import ArgumentError, CloneNameError, DataError
from netclone.files.archiving import read_header
from netclone.metrics.trading import trade_off, trades


def sampled(count=60):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 7


# The bias


def test_a_bias_is_added_to_each_logit_and_taken_back():
    biased = HERONS.with_bias(0.75)
    features = torch.randn(3, 4, 6, 6)
    assert torch.equal(run(biased, features), run(HERONS, features) + 0.75)
    assert torch.equal(run(biased.with_bias(-2).with_bias(0), features), run(HERONS, features))
    assert biased.spec == HERONS.with_spec(bias=0.75).spec and HERONS.spec.bias == 0
    assert biased.certificate == HERONS.certificate
    for wrong in (float("nan"), float("inf"), "1", True):
        with pytest.raises(ArgumentError, match="bias: got .*, expected a finite number"):
            HERONS.with_bias(wrong)


def test_a_bias_moves_the_columns_of_its_clone_alone():
    grafted, moved = two(), two(herons=HERONS.with_bias(0.75))
    whole, other = run(grafted), run(moved)
    assert torch.equal(other[:, 4:6], whole[:, 4:6] + 0.75)
    assert torch.equal(other[:, [0, 1, 2, 3, 6]], whole[:, [0, 1, 2, 3, 6]])
    former = replace(grafted, "herons", HERONS.with_bias(0.75))
    assert torch.equal(run(grafted), other)
    replace(grafted, "herons", former)
    assert torch.equal(run(grafted), whole)


@pytest.mark.parametrize("dtype, version", [(None, 5), ("bf16", 5)])
def test_a_file_keeps_the_bias(tmp_path, dtype, version):
    path = tmp_path / "clone.safetensors"
    netclone.save(HERONS.with_bias(-1.5), path, dtype)
    again = netclone.load(path)
    assert again.spec.bias == -1.5 and read_header(path).format_version == version
    assert torch.equal(run(again.with_bias(0), torch.ones(1, 4, 6, 6)) - 1.5, run(again, torch.ones(1, 4, 6, 6)))
    damaged = path.read_bytes().replace(b'\\"bias\\": -1.5', b'\\"bias\\": -1.4')
    path.write_bytes(damaged)
    with pytest.raises(netclone.ArchiveError, match="digest"):
        netclone.load(path)


def test_files_without_a_bias_are_written_as_before(tmp_path):
    netclone.save(HERONS.with_bias(1).with_bias(0), tmp_path / "clone.safetensors")
    header = read_header(tmp_path / "clone.safetensors")
    assert header.format_version == 2 and header.spec == HERONS.spec


# The curve


def test_every_point_is_what_the_biased_clone_does():
    data = sampled()
    grafted = two(herons=HERONS.with_bias(0.25))
    before = run(grafted)
    curve = trade_off(grafted, data, "herons", batch_size=16)
    assert torch.equal(run(grafted), before) and curve.share == pytest.approx(2 / 7, abs=0.02)
    measured = copy.deepcopy(grafted)
    for point in [curve.present, *curve.points[::9], curve.points[-1]]:
        replace(measured, "herons", HERONS.with_bias(point.bias))
        predicted, labels = run(measured, data[0]).argmax(1), data[1]
        own, taken = (labels == 4) | (labels == 5), (predicted == 4) | (predicted == 5)
        right = predicted == labels
        seen = [float(part.double().mean()) for part in (right[~own], right[own], taken[~own], ~taken[own])]
        assert seen == [point.old, point.new, point.mistaken, point.missed]
    biases = [point.bias for point in curve.points]
    assert biases == sorted(biases)
    assert curve.points[0].missed == 1 and curve.points[-1].mistaken == 1
    assert curve.present.bias == 0.25


def test_the_cost_of_mistakes_chooses():
    curve = trade_off(two(), sampled(), "herons")
    costs = (0, 0.1, 1, 10, 1000)
    chosen = [curve.cheapest(cost) for cost in costs]
    assert chosen[0].missed == 0 and chosen[-1].mistaken == 0
    assert [point.bias for point in chosen] == sorted((point.bias for point in chosen), reverse=True)
    for cost, point in zip(costs, chosen, strict=True):
        paid = [curve.share * p.missed + (1 - curve.share) * cost * p.mistaken for p in curve.points]
        here = curve.share * point.missed + (1 - curve.share) * cost * point.mistaken
        assert here == pytest.approx(min(paid))
    assert curve.cheapest(1, share=0.01).bias <= curve.cheapest(1, share=0.9).bias
    for arguments in ((-1,), (float("nan"),), (1, 2)):
        with pytest.raises(ArgumentError, match="cost|share"):
            curve.cheapest(*arguments)


def test_a_tie_is_not_taken_and_what_a_gate_skips_never_is():
    logits = torch.tensor([[1.0, 1.0], [0.0, -torch.inf], [0.0, 2.0]])
    curve = trades(logits, torch.tensor([0, 1, 1]), [1], 0.0)
    assert [(point.bias, point.mistaken, point.missed) for point in curve.points] == [
        (-3.0, 0.0, 1.0),
        (-1.0, 0.0, 0.5),
        (1.0, 1.0, 0.5),
    ]
    assert curve.present.mistaken == 0


def test_what_has_no_curve():
    grafted = two()
    images, labels = sampled(12)
    with pytest.raises(CloneNameError, match="say which one"):
        trade_off(grafted, (images, labels))
    with pytest.raises(CloneNameError, match="did you mean 'herons'"):
        trade_off(grafted, (images, labels), "heron")
    with pytest.raises(ArgumentError, match="holds no clones"):
        trade_off(extracted(1).body, (images, labels))
    for labels, kind in ((torch.zeros(12).long(), "the clone's"), (torch.full((12,), 4), "other")):
        with pytest.raises(DataError, match=f"no image of {kind} classes"):
            trade_off(grafted, (images, labels), "herons")
    disable(grafted, "herons")
    with pytest.raises(ArgumentError, match=r"is off; switch it on with netclone.enable\(grafted, 'herons'\)"):
        trade_off(grafted, sampled(14), "herons")
