"""What of a classifier is fitted: chosen on samples left out, never worse there than the start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from netclone.errors import FitError
from netclone.learning import choosing
from netclone.learning.adapting import Branch, Cached, Classifier
from netclone.learning.choosing import FITS, NO_FIT, choose, fit_classifier
from netclone.learning.stepping import Loop

OLD, NEW, FEATURES = 3, 2, 6


def samples(count: int, seed: int = 0, noise: float = 1.0) -> Cached:
    """Features and the target's logits that say the class, more or less."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % (OLD + NEW)
    hot = nn.functional.one_hot(labels, OLD + NEW).float()
    features = 3 * hot @ torch.eye(OLD + NEW, FEATURES) + noise * torch.randn(count, FEATURES, generator=generator)
    logits = 4 * hot[:, :OLD] + torch.randn(count, OLD, generator=generator)
    return Cached(features, logits, labels)


def classifier(cached: Cached, scale: float = 1.0, shift: float = 0.0) -> Classifier:
    """At its start, from a source that knows every class, too sure of itself or too fond of the new ones."""
    made = Classifier(FEATURES, OLD, NEW)
    rows = scale * torch.eye(OLD + NEW, FEATURES)
    order = [OLD, OLD + 1, 0, 1, 2]
    made.start(cached.features, cached.logits, rows[order], torch.tensor([shift] * NEW + [0.0] * OLD))
    return made


def state(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(map(torch.equal, one, two))


def chosen(made: Classifier, cached: Cached, seed: int = 0, shows: Tensor | None = None) -> choosing.Choice:
    ids = torch.arange(len(cached)) if shows is None else shows
    return choose(made, cached, ids, torch.Generator().manual_seed(seed))


def test_a_start_that_cannot_be_bettered_stays_bit_by_bit() -> None:
    """With features about 3 in their class's place, three times them are the classes' log odds."""
    cached = samples(150)
    made = classifier(cached, scale=3.0)
    before = state(made)
    assert chosen(made, cached).fit == NO_FIT
    assert same(before, state(made))


@pytest.mark.parametrize(("scale", "shift"), [(0.2, 0.0), (1.0, 3.0), (1.0, -4.0)])
def test_a_start_that_is_off_is_mended(scale: float, shift: float) -> None:
    cached, others = samples(200), samples(400, seed=1)
    made = classifier(cached, scale, shift)

    def accuracy() -> float:
        right = torch.cat([others.logits, made(others.features, others.logits)], 1).argmax(1) == others.labels
        return others.over_kinds(right.double())

    before = accuracy()
    found = chosen(made, cached)
    assert found.fit != NO_FIT
    assert accuracy() > before + 0.02
    assert made.scale != 1


def test_a_lower_loss_that_costs_accuracy_does_not_count() -> None:
    cached = samples(40, seed=2, noise=2.0)
    found = chosen(classifier(cached, 0.6), cached, seed=2)
    losses, scores = dict(found.losses), dict(found.scores)
    best = min(losses, key=losses.__getitem__)
    assert best != NO_FIT and scores[best] < scores[NO_FIT]  # what this is about
    assert found.fit == NO_FIT


@pytest.mark.parametrize(("gated", "fits"), [(True, False), (False, True)])
def test_a_formula_stays_unless_a_fit_is_surely_more_accurate(
    gated: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a start that is no formula, a lower loss at the same accuracy is enough."""
    cached = samples(100)
    made = classifier(cached)
    made.gated = gated

    def surer(rows: Any, start: Any, tried: Any, fold: Any) -> dict[str, Tensor]:
        """The same answers from every candidate, surer after a fit."""
        return {NO_FIT: rows.outputs(start) / 4, **dict.fromkeys(tried, rows.outputs(start) / 2)}

    monkeypatch.setattr(choosing, "_left_out", surer)
    found = chosen(made, cached)
    assert len(set(dict(found.scores).values())) == 1
    assert (found.fit != NO_FIT) == fits


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 40), noise=st.floats(0.1, 5), scale=st.floats(0.1, 3), seed=st.integers(0, 99))
def test_what_is_chosen_is_never_worse_than_no_fit_on_what_was_left_out(
    count: int, noise: float, scale: float, seed: int
) -> None:
    cached = samples(count, seed, noise)
    found = chosen(classifier(cached, scale), cached, seed)
    for values, better in ((dict(found.losses), -1), (dict(found.scores), 1)):
        assert list(values) == [NO_FIT, *(FITS if count >= 25 else ())]  # of five classes
        assert better * values[found.fit] >= better * values[NO_FIT]
        assert found.fit == NO_FIT or values[found.fit] != values[NO_FIT]
    assert dict(found.scores)[found.fit] == pytest.approx(cached.over_kinds(found.right.double()))


@pytest.mark.parametrize(("each", "gated", "tried"), [(4, True, 1), (5, True, 5), (2, False, 5)])
def test_a_formula_is_not_fitted_to_fewer_samples_than_folds(each: int, gated: bool, tried: int) -> None:
    """Logits that are in no relation to the target's are: they are no answer by themselves."""
    cached = samples(each * (OLD + NEW))
    made = classifier(cached)
    made.gated = gated
    assert len(chosen(made, cached).scores) == tried


def test_the_same_seed_chooses_and_fits_the_same_and_draws_from_nothing_else() -> None:
    cached = samples(50)
    states = []
    for disturb in (1, 2):
        torch.manual_seed(disturb)
        made = classifier(cached, 0.3)
        before = torch.get_rng_state()
        chosen(made, cached, seed=7)
        assert torch.equal(before, torch.get_rng_state())
        states.append(state(made))
    assert same(*states)


def test_views_of_a_sample_are_left_out_together() -> None:
    """Copies of a sample as its views: left out one by one, they would tell each other's class."""
    cached = samples(50, noise=3.0)
    twice = Cached(*(torch.cat([part, part]) for part in (cached.features, cached.logits, cached.labels)))
    ids = torch.arange(50)
    fold = choosing.folds(twice.labels, torch.cat([ids, ids]), torch.Generator().manual_seed(0))
    assert torch.equal(fold[:50], fold[50:])
    for label in range(OLD + NEW):
        assert fold[:50][cached.labels == label].bincount(minlength=5).tolist() == [2] * 5
    once = chosen(classifier(cached, 0.3), cached)
    views = chosen(classifier(cached, 0.3), twice, shows=torch.cat([ids, ids]))
    assert dict(once.losses)[NO_FIT] == pytest.approx(dict(views.losses)[NO_FIT], rel=1e-5)


def test_features_that_are_not_finite_are_refused() -> None:
    cached = samples(20)
    made = classifier(cached)
    cached.features[0, 0] = torch.nan
    with pytest.raises(FitError, match="the loss is not finite; check the data's scale"):
        chosen(made, cached)


def fitted(made: Classifier, train: Cached, held_out: Cached, **options: bool) -> tuple[float, choosing.Choice | None]:
    branch = Branch(nn.Identity(), nn.Identity(), made)
    shows = torch.arange(len(train) + len(held_out))
    loop = Loop(batch_size=8, generator=torch.Generator().manual_seed(0))
    return fit_classifier(branch, train, held_out, shows, loop=loop, **options)


def test_the_score_is_of_held_out_samples_classified_unseen() -> None:
    train, held_out = samples(80), samples(25, seed=3)
    score, choice = fitted(classifier(train, 0.3), train, held_out)
    assert choice is not None
    assert score == held_out.over_kinds(choice.right[80:].double())
    assert "left out, no fit" in dict(choice.told())
    assert sum(name.endswith("(chosen)") for name, _ in choice.told()) == 2


def test_without_old_samples_the_sources_own_odds_stand() -> None:
    both = samples(60)
    new = both[(both.labels >= OLD).nonzero().flatten()]
    made = classifier(both)
    before = state(made)
    score, choice = fitted(made, new, new)
    assert choice is None
    assert same(before, state(made))
    assert 0 <= score <= 1


@pytest.mark.parametrize("calibrate", [True, False])
def test_a_source_of_the_new_classes_alone_is_fitted_among_them(calibrate: bool) -> None:
    both = samples(120)
    new = both[(both.labels >= OLD).nonzero().flatten()]
    made = Classifier(FEATURES, OLD, NEW)
    made.start(both.features, both.logits, 0.1 * torch.eye(OLD + NEW, FEATURES)[OLD:], None)
    score, choice = fitted(made, new if calibrate else both, both, calibrate=calibrate)
    assert choice is not None and choice.fit != NO_FIT
    out = made(new.features, new.logits)
    assert (out.argmax(1) + OLD == new.labels).double().mean() > 0.9
    won = (out.amax(1) > new.logits.amax(1)).double().mean()
    assert not calibrate or won == pytest.approx(0.9, abs=0.03)


def test_in_no_committed_run_is_the_fit_worse_than_no_fit() -> None:
    file = Path(__file__).parents[1] / "docs" / "results" / "fitting.json"
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    assert runs and all(run["fits"]["clone"]["mean"] >= run["fits"]["no fit"]["mean"] for run in runs)
