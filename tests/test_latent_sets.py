"""Files of latent clone sets: they come back as they were written, and anything else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from netclone.errors import ArchiveError
from netclone.files.latent_sets import read_latents, write_latents
from netclone.files.spec import CloneSpec
from netclone.runtime.digests import content_digest

SPEC = CloneSpec((4, 1), ("a", "b"), None, (3, 8, 8), 1e-16, at="input", feature_node="fc", feature_shape=(3,))
TENSORS = {
    "features": torch.randn(6, 5),
    "labels": torch.tensor([0, 1, 2, 3, 4, 4]),
    "logits": torch.randn(6, 3),
}


def test_a_set_comes_back_to_the_bit(tmp_path: Path) -> None:
    write_latents(SPEC, "digest", TENSORS, tmp_path / "set")
    spec, body, tensors = read_latents(tmp_path / "set")
    assert (spec, body) == (SPEC, "digest")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_features_of_the_target_stand_beside_logits_of_any_width(tmp_path: Path) -> None:
    given = TENSORS | {"target_features": torch.randn(6, 3), "logits": torch.randn(6, 4)}
    write_latents(SPEC, "", given, tmp_path / "set")
    read = read_latents(tmp_path / "set")[2]
    assert read.keys() == given.keys() and all(torch.equal(read[name], tensor) for name, tensor in given.items())


def test_damage_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set"
    with pytest.raises(ArchiveError, match="no such file"):
        read_latents(path)
    write_latents(SPEC, "", TENSORS, path)
    whole = path.read_bytes()
    for place in (len(whole) - 3, len(whole) - 60, whole.index(b"feature_shape") + 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArchiveError, match="cannot read"):
            read_latents(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(ArchiveError, match="cannot read"):
        read_latents(path)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArchiveError, match="no latent clone set"):
        read_latents(path)


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"format_version": 3}, {}, "newer netclone"),
        ({"format_version": 0}, {}, "format 0"),
        ({"body": 3}, {}, "expected a digest"),
        ({"more": 1}, {}, "more"),
        ({"spec": {}}, {}, "classes"),
        ({}, {"extra": torch.zeros(1)}, "expected features, labels, logits"),
        ({}, {"labels": torch.arange(6)}, "labels run from 0 to 5, of 5 columns"),
        ({}, {"labels": torch.arange(5)}, "not features, labels and logits \\(3,\\) of one set"),
        ({}, {"labels": torch.zeros(6)}, "expected floats, and int64 labels"),
        ({}, {"logits": torch.zeros(6, 4)}, "not features, labels and logits \\(3,\\) of one set"),
        ({}, {"logits": torch.zeros(5, 3)}, "of other samples"),
        ({}, {"features": torch.full((6, 5), torch.nan)}, "not finite"),
        ({"format_version": 2}, {}, "expected features, labels, logits, target_features"),
        ({"format_version": 2}, {"target_features": torch.zeros(6, 4)}, "and target_features \\(3,\\) of one set"),
        ({"format_version": 2}, {"target_features": torch.zeros(5, 3)}, "of other samples"),
        ({"format_version": 1}, {"target_features": torch.zeros(6, 3)}, "expected features, labels, logits"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_refused_under_a_valid_digest(
    tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Tensor], message: str
) -> None:
    path = tmp_path / "set"
    write_latents(SPEC, "", TENSORS, path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["netclone_latents"])
    del header["sha256"]
    header |= changes
    made = TENSORS | tensors
    header["sha256"] = content_digest(header, made)
    safetensors.torch.save_file(made, path, metadata={"netclone_latents": json.dumps(header)})
    with pytest.raises(ArchiveError, match=message):
        read_latents(path)
