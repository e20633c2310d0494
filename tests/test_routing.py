"""A router leaves out the share of old images that was asked for, and as few new ones as its features allow."""

import pytest
import torch

from netclone.errors import AdapterError, DataError
from netclone.learning.routing import Routed, Router, fit_router

OLD, NEW = 2, 1


def samples(count: int, shift: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps ``(N, 4, 2, 2)`` whose second channel is higher for new classes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % (OLD + NEW)
    maps = torch.randn(count, 4, 2, 2, generator=generator) * 2 + 5
    maps[labels >= OLD, 1] += shift
    return maps, labels


def fitted(maps: torch.Tensor, labels: torch.Tensor, share: float, seed: int = 0) -> Routed:
    rows, generator = torch.arange(len(labels)), torch.Generator().manual_seed(seed)
    return fit_router([maps], labels, rows, old=OLD, share=share, generator=generator)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_asked_share_of_old_images_is_left_out_on_samples_never_seen(share: float) -> None:
    found = fitted(*samples(600), share)
    maps, labels = samples(3000, seed=1)
    sent = found.router(maps) > 0
    assert float((~sent)[labels < OLD].double().mean()) == pytest.approx(share, abs=0.06)
    assert found.skipped == pytest.approx(share, abs=0.01)
    assert float((~sent)[labels >= OLD].double().mean()) == pytest.approx(found.missed, abs=0.04)
    assert found.missed < share / 4


def test_features_that_say_nothing_lose_as_many_new_images_as_old_ones() -> None:
    found = fitted(*samples(600, shift=0), 0.5)
    assert found.missed == pytest.approx(0.5, abs=0.15)


def test_an_images_score_depends_on_its_own_features_alone() -> None:
    maps, labels = samples(60)
    router = fitted(maps, labels, 0.5).router
    assert torch.allclose(torch.cat([router(one[None]) for one in maps]), router(maps), atol=1e-5)


def test_the_same_samples_and_seed_give_the_same_router() -> None:
    maps, labels = samples(90)
    one, two = (fitted(maps, labels, 0.5).router for _ in range(2))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


def test_views_of_a_sample_are_left_out_together() -> None:
    """With random labels, copies in other folds would be recognised, and nothing would seem to be missed."""
    maps = torch.randn(40, 200, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % (OLD + NEW)
    twice = maps.repeat(3, 1, 1, 1), labels.repeat(3), torch.arange(40).repeat(3)
    found = fit_router([twice[0]], *twice[1:], old=OLD, share=0.5, generator=torch.Generator().manual_seed(0))
    assert found.missed > 0.2


def test_channels_that_never_vary_do_no_harm() -> None:
    maps, labels = samples(90)
    maps[:, 3] = 7.0
    router = fitted(maps, labels, 0.5).router
    assert bool(router(maps).isfinite().all())


def test_too_few_samples_of_a_kind_are_refused() -> None:
    maps, labels = samples(12)
    with pytest.raises(DataError, match="data: 4 samples are too few"):
        fitted(maps, labels, 0.5)
    few = torch.tensor([0, 1, 0, 1, *[2] * 8])
    with pytest.raises(DataError, match="target_data: 4 samples are too few"):
        fitted(maps, few, 0.5)


def test_weights_that_do_not_fit_the_features_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"got \(3,\) and \(\)"):
        Router([(2, 4, 4)], torch.zeros(3), torch.zeros(()))


@pytest.mark.parametrize("shape, mean", [((3,), ()), ((3, 4, 5), (2, 3)), ((7, 7, 3), (1, 2)), ((17, 3), (1,))])
def test_maps_tokens_and_vectors_are_averaged_over_their_grids(shape: tuple[int, ...], mean: tuple[int, ...]) -> None:
    features = torch.randn(2, *shape)
    router = Router([shape], torch.ones(3), torch.zeros(()))
    assert torch.equal(router.pooled(features), features.mean(mean) if mean else features)
