"""What a header says of a clone becomes a spec only where every field is what it has to be."""

import dataclasses
import json

import pytest

from netclone.errors import ArchiveError
from netclone.files.spec import Candidate, CloneSpec, spec_from_data
from netclone.graph.preparing import Preparation

SPEC = CloneSpec(
    classes=(4, 2),
    class_names=("owl", "wren"),
    source_at="layer2",
    input_shape=(8, 4, 4),
    certificate=1e-12,
    at="layer3",
    target_input_shape=(3, 32, 32),
    kept=(("layer3.0.conv1", 3, 8),),
    scores=(("layer3", 0.9),),
    search=(Candidate("layer3", "layer2", 0.9), Candidate("layer4", None, None, "did not fit")),
    target_digests=(("float32", "00ff"),),
    target_preparation=Preparation((3, 32, 32), (0.5,) * 3, (0.2,) * 3, "bicubic", 0.9, "center"),
)


def data(**changed):
    """A spec as the JSON of a header says it."""
    return {**json.loads(json.dumps(dataclasses.asdict(SPEC))), **changed}


def test_a_spec_survives_json():
    assert spec_from_data(data()) == SPEC


def test_fields_younger_than_the_format_may_be_missing():
    older = {k: v for k, v in data().items() if k not in ("target_digests", "target_preparation")}
    assert spec_from_data(older) == dataclasses.replace(SPEC, target_digests=(), target_preparation=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("classes", value) for value in ([], [1.0, 2], [2**63, 1], "12", [4])),
        *(("class_names", value) for value in (["owl"], ["owl", 3], ["owl", "w\x1b[31mren"])),
        *(("input_shape", value) for value in ([-1, 4], [2**40, 2**40], None, [True])),
        *(("certificate", value) for value in (-1e-9, {"float": "nan"}, {"float": "inf"}, "0", None)),
        *(("kept", value) for value in ([["a", 9, 8]], [["a", -1, 8]], [["a", 0, 0]], [["a", 1]], {})),
        *(("scores", value) for value in ([["layer3"]], [["layer3", {"float": "nan"}]])),
        *(("search", value) for value in ([{"at": "layer3"}], [{**data()["search"][0], "more": 1}])),
        *(("source_fingerprint", value) for value in (None, 3)),
        *(("target_preparation", value) for value in ({}, {**data()["target_preparation"], "std": [0.0] * 3})),
    ],
)
def test_a_field_that_is_something_else_is_refused_by_name(field, value):
    with pytest.raises(ArchiveError, match=r"spec|classes|candidate") as info:
        spec_from_data(data(**{field: value}))
    assert field in str(info.value) or "class names" in str(info.value)


def test_fields_that_are_missing_or_unknown_are_refused():
    short = data()
    del short["kept"]
    for value in (short, data(more=1), [], None):
        with pytest.raises(ArchiveError, match="spec"):
            spec_from_data(value)
