"""Stages: all of a network once, few enough, and cut where a clone reads; rows: what was cloned of each layer."""

from __future__ import annotations

import pytest
from grafts import LONG, cnn_graft, vit_graft
from torch import fx

import netclone
from netclone.reporting.stages import Row, rows, stages

pytestmark = pytest.mark.slow  # all of it rests on whole runs


@pytest.fixture(scope="module")
def cnn() -> fx.GraphModule:
    return cnn_graft()


@pytest.fixture(scope="module")
def vit() -> fx.GraphModule:
    return vit_graft()


def test_stages_of_a_cnn(cnn: fx.GraphModule) -> None:
    found = stages(cnn, "digits", 7)
    expected = [
        ("conv1", "act1"),
        ("maxpool", "layer1"),
        ("layer2", "layer2"),
        ("layer3", "layer3"),
        ("layer4", "layer4"),
        ("global_pool", "global_pool"),
        ("fc", "fc"),
    ]
    assert [(stage.paths[0], stage.paths[-1]) for stage in found] == expected
    assert [stage.shape for stage in found][2:] == [(48, 8, 8), (192, 4, 4), (96, 2, 2), (96,), (7,)]


def test_stages_hold_every_parameter_of_the_target_once(cnn: fx.GraphModule, vit: fx.GraphModule) -> None:
    for grafted, name in ((cnn, "digits"), (vit, LONG)):
        target = netclone.remove(grafted, name)
        for most in (2, 3, 7, 50):
            found = stages(grafted, name, most)
            assert sum(stage.parameters for stage in found) == sum(p.numel() for p in target.parameters())


def test_stages_end_at_the_tap_however_few(vit: fx.GraphModule) -> None:
    for most in (2, 4, 7):
        found = stages(vit, LONG, most)
        assert "blocks.1" in [stage.paths[-1] for stage in found]
        assert len(found) <= max(most, 4)  # tap, features and logits end stages of their own


def test_rows_show_what_was_left_behind(cnn: fx.GraphModule) -> None:
    module = cnn.get_submodule("digits")
    found = {row.label: row for row in rows(module, 14)}
    assert found["conv_stem"] == Row("conv_stem", 0, 24)
    assert found["blocks.4.0.conv_pw"] == Row("blocks.4.0.conv_pw", 96, 192)
    assert len(found) <= 14


def test_rows_are_summed_by_block_where_there_are_many(cnn: fx.GraphModule) -> None:
    module = cnn.get_submodule("digits")
    every = rows(module, 100)
    for most in (2, 4, 8):
        few = rows(module, most)
        assert len(few) <= most
        assert sum(row.kept for row in few) == sum(row.kept for row in every)
        assert sum(row.total for row in few) == sum(row.total for row in every)
