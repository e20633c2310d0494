"""Thumbnails: small pictures that show what was given."""

import base64
import io

import numpy
import pytest
import torch
from PIL import Image

import netclone
from netclone.reporting.thumbnails import SIDE, thumbnails


def decoded(uri):
    kind, _, content = uri.partition(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_small_pictures_are_shown_to_the_bit():
    images = torch.rand(2, 3, 16, 20)
    kind, picture = decoded(thumbnails(images, lambda batch: batch)[1])
    assert kind == "data:image/png"
    assert numpy.array_equal(numpy.asarray(picture), (images[1] * 255).round().byte().permute(1, 2, 0).numpy())


def test_without_a_map_each_image_runs_from_dark_to_bright():
    images = torch.stack([torch.linspace(-3, 5, 64).view(1, 8, 8), torch.full((1, 8, 8), 7.0)])
    ramp, flat = (numpy.asarray(decoded(uri)[1]) for uri in thumbnails(images))
    assert ramp.shape == (8, 8, 3) and ramp.min() == 0 and ramp.max() == 255
    assert flat.min() == flat.max()


def test_large_pictures_are_made_small():
    kind, picture = decoded(thumbnails(torch.rand(1, 3, 400, 200))[0])
    assert kind == "data:image/jpeg"
    assert picture.size == (SIDE // 2, SIDE)


def test_what_is_no_picture_is_not_shown():
    assert thumbnails(torch.rand(2, 5, 8, 8)) == ()
    assert thumbnails(torch.rand(2, 5)) == ()
    assert thumbnails(torch.rand(0, 3, 8, 8)) == ()


@pytest.mark.parametrize(
    "pixels", [lambda batch: batch[:1], lambda batch: "no", lambda batch: batch / 0, lambda batch: batch[:, :2]]
)
def test_refuses_what_is_not_rgb(pixels):
    with pytest.raises(netclone.ArgumentError, match="pixels: returned .* expected RGB"):
        thumbnails(torch.ones(2, 3, 8, 8), pixels)


def test_the_images_are_untouched():
    images = torch.rand(1, 3, 8, 8)
    before = images.clone()
    thumbnails(images, lambda batch: batch.zero_())
    assert torch.equal(images, before)
