"""Baselines that learn from other papers: what these say, on cases small enough to work out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from netclone.baselines import ENSEMBLES, TUNING, InapplicableError, Problem, Recipe, tune, validated
from netclone.baselines.expanding import STRETCH, Branch, Expanded
from netclone.baselines.merging import Merge, Zipped, _folded, _measure_norms
from netclone.baselines.metalearning import Represented, merlin
from netclone.baselines.patching import Patched
from netclone.baselines.pooling import distance
from netclone.baselines.prompting import Prompted, Similar
from netclone.baselines.starting import earlier_clones, known, mean_of_others
from netclone.baselines.unifying import Teacher, counterparts
from netclone.benchmarking.networks import ResNet
from netclone.channels.grouping import channel_groups
from netclone.learning import choosing
from netclone.learning.adapting import Cached
from netclone.learning.data import Samples
from netclone.metrics.evaluating import predict

OLD = 3
QUICK = Recipe(lr=1e-2, steps=2, batch_size=8)


def problem(count: int = 40) -> Problem:
    """Five classes of points in five dimensions; the source's first three columns are the old classes, mixed up."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    images = 2 * torch.eye(5)[labels] + torch.randn(count, 5, generator=generator) / 4
    target, source = (nn.Sequential(nn.Linear(5, classes, bias=False)) for classes in (OLD, 5))
    with torch.no_grad():
        target[0].weight.copy_(3 * torch.eye(5)[:OLD])
        source[0].weight.copy_(3 * torch.eye(5)[[2, 0, 1, 4, 3]])
    data = Samples(images, labels, "data")
    return Problem(target, source, (4, 3), train=data, validation=data)


def accuracy(model: nn.Module, given: Problem) -> float:
    with torch.no_grad():
        return float((model(given.train.images).argmax(1) == given.train.labels).double().mean())


def test_a_unified_network_has_each_classifiers_odds_among_its_classes() -> None:
    """Classifier 0 against 1, at odds of 4: cross entropy of (4, 1) / 5 with q restricted to (0.1, 0.3) / 0.4."""
    logits = torch.tensor([[0.1, 0.3, 0.6]]).log()
    given = nn.Linear(1, 2)
    with torch.no_grad():
        given.weight.zero_()
        given.bias.copy_(2 * torch.tensor([4.0, 1.0]).log())  # at a temperature of 2
    teacher = Teacher(given, torch.tensor([0, 1]), torch.eye(3, 2, dtype=torch.bool))
    found = teacher.disagreement(torch.zeros(1, 1), 2 * logits)
    assert float(found) == pytest.approx(-0.8 * math.log(0.25) - 0.2 * math.log(0.75))


def test_networks_are_unified_without_labels() -> None:
    given = problem()
    z, s = given.target(given.train.images), given.source(given.train.images)
    assert counterparts(z, s, given.classes) == {0: 1, 1: 2, 2: 0}
    wrong = replace(given, train=replace(given.train, labels=torch.zeros_like(given.train.labels)))
    recipe = Recipe(lr=0.1, steps=40, batch_size=20)
    model = TUNING["UHC"](wrong, recipe)
    assert accuracy(model, given) == 1
    assert all(map(torch.equal, model.parameters(), TUNING["UHC"](given, recipe).parameters()))


def test_a_student_learns_from_the_source_what_its_labels_do_not_say() -> None:
    given = problem()
    mute = replace(given, train=replace(given.train, labels=given.train.labels.clamp_max(OLD)))  # one class for two
    recipe = Recipe(lr=0.1, steps=80, batch_size=20, distillation=10.0)
    taught = TUNING["source as teacher"](mute, recipe)
    assert accuracy(taught, given) == 1 > accuracy(TUNING["fine-tune"](mute, recipe), given)


def sure(count: int, rare: int) -> Problem:
    """Five classes drawn with the odds ``softmax(x)``; the source claims their third power. New ones are rare."""
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(count, 5, generator=generator)
    labels = images.softmax(1).multinomial(1, generator=generator).flatten()
    few = torch.cat([(labels == c).nonzero().flatten()[: rare if c >= OLD else None] for c in range(5)])
    base = problem()
    target, source = nn.Sequential(nn.Linear(5, OLD, bias=False)), nn.Sequential(nn.Linear(5, 5, bias=False))
    with torch.no_grad():
        target[0].weight.copy_(torch.eye(5)[:OLD])
        source[0].weight.copy_(3 * torch.eye(5)[[2, 0, 1, 4, 3]])
    parts = [Samples(images[half], labels[half], "data") for half in (few[::2], few[1::2])]
    return replace(base, target=target, source=source, train=parts[0], validation=parts[1])


def test_a_start_is_the_mean_of_what_earlier_clones_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is three times too sure. Clones of frequent classes find that, and one of a rare class cannot."""
    monkeypatch.setattr(choosing, "STEPS", 10)
    monkeypatch.setattr(choosing, "SURE", 1.0)  # what these clones find gains little accuracy
    given = sure(400, rare=4)
    plain, learned = (ENSEMBLES[name](given, QUICK) for name in ("fitted gated ensemble", "learned start"))
    assert float(plain.classifier.scale) == 1
    fresh = sure(1200, rare=999).train
    losses = [-validated(model, fresh, OLD)[1] for model in (plain, learned)]
    assert losses[1] < losses[0]

    images = torch.cat([given.train.images, given.validation.images])
    seen = Cached(images, predict(given.target, images), torch.cat([given.train.labels, given.validation.labels]))
    linear = given.source[0]
    assert known(linear, seen, given.classes) == {0: 1, 1: 2, 2: 0}
    found = earlier_clones(plain.classifier, seen, linear, given.classes, 0)
    assert sorted(found) == [0, 1, 2, 3, 4]
    hidden = [torch.isnan(numbers[-OLD:]).nonzero().flatten().tolist() for numbers in found.values()]
    assert hidden == [[0], [1], [2], [], []]
    assert found[3][0] == found[4][0] == 1  # rare ones stay where clones start
    for column, bias, weight in zip(
        (3, 4), learned.classifier.linear.bias, learned.classifier.linear.weight, strict=True
    ):
        _, expected_bias, expected = mean_of_others(found, column).to(weight).split([1, 1, 5 + OLD])
        torch.testing.assert_close(torch.cat([bias[None], weight]), torch.cat([expected_bias, expected]))


def test_without_another_class_there_is_nothing_to_start_from() -> None:
    """One new class, and of the others the source takes every image for one and the same."""
    given = problem()
    data = replace(given.train, labels=given.train.labels.clamp_max(OLD))
    alone = replace(given, source=nn.Sequential(nn.Linear(5, 2)), classes=(1,), train=data, validation=data)
    with pytest.raises(InapplicableError, match="no class that an earlier clone could have been of"):
        ENSEMBLES["learned start"](alone, QUICK)


class Small(nn.Module):
    """Two layers of convolutions, the second of which reads three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 3, padding=1)
        self.head = nn.Linear(2, OLD)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return out


def pictures() -> Problem:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 5
    data = Samples(torch.randn(20, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1), labels, "data")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Problem(Small(), nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), (3, 4), train=data, validation=data)


def test_masks_leave_a_share_of_weights_and_learn_as_if_they_were_soft() -> None:
    """L_S with masks a, b of the two layers: (3 |a| + 27/3 |a||b| * 2/2 + |b| * 8) over the same with all ones."""
    branch = Branch(pictures())
    e = [torch.tensor([0.0, 1.0, -2.0]), torch.tensor([3.0, -3.0])]
    with torch.no_grad():
        branch.masks.strengths.copy_(torch.cat(e) / STRETCH)
    branch.masks.steepness = 4.0
    branch.masks.now = branch.masks()
    masks = [(4 * part).sigmoid() for part in e]
    torch.testing.assert_close(branch.masks.now, torch.cat([torch.ones(1), *masks]))
    a, b = (float(part.detach().sum()) for part in masks)
    weights = 1 * 3, 9 * 3 * 2, 2 * (OLD + 2 + 2 + 1)
    left = weights[0] * a / 3 + weights[1] * a / 3 * b / 2 + weights[2] * b / 2
    assert branch.size().item() == pytest.approx(left / sum(weights))
    [gradient] = torch.autograd.grad(branch.masks.now.sum(), [branch.masks.strengths])
    soft = torch.cat(e).sigmoid()
    torch.testing.assert_close(gradient, STRETCH * soft * (1 - soft))


def test_masked_channels_are_gone_from_a_branch_that_computes_the_same() -> None:
    given = pictures()
    branch = Branch(given)
    with torch.no_grad():
        branch.masks.strengths.copy_(torch.tensor([1.0, -1.0, 1.0, -2.0, -1.0]))  # of the second layer the best stays
    target = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    masked = Expanded(target, branch, 5)
    assert masked(given.train.images).shape == (20, 5 + 3)
    expected = masked.eval()(given.train.images)
    slim = Expanded(target, branch.slim(), 5).eval()
    torch.testing.assert_close(slim(given.train.images), expected)
    assert [len(p) for p in slim.branch.parameters() if p.dim() == 4] == [2, 1]


def test_the_sparsity_loss_makes_the_second_network_smaller() -> None:
    given = pictures()
    sizes = []
    for sparsity in (0.0, 10.0):
        model = TUNING["DER"](given, replace(QUICK, lr=0.1, steps=30, sparsity=sparsity))
        sizes.append(sum(p.numel() for p in model.branch.parameters()))
    assert sizes[1] < sizes[0]


def test_pooled_features_are_compared_relative_to_the_old_ones() -> None:
    old = torch.ones(2, 4, 4, 4)
    assert float(distance(1.5 * old, old)) == pytest.approx(0.25)
    checkers = old + (-1.0) ** torch.arange(4).view(1, 1, 1, 4)  # no strip along the width, and no cube of 2 sees it
    assert float(distance(checkers, old)) == pytest.approx(2 / 5)  # the strips across it, and the smallest cubes, do


def test_pooled_distillation_holds_features() -> None:
    given = pictures()

    def features(model: nn.Module) -> Tensor:
        out: Tensor = model.second(model.first(given.train.images).relu())
        return out

    moved = []
    for weight in (0.0, 100.0):
        model = TUNING["PCSD"](given, replace(QUICK, lr=1e-2, steps=40, distillation=weight))
        moved.append((features(model) - features(given.target)).norm().item())
    assert moved[1] < moved[0] / 2


class Mix(nn.Module):
    """A block of one channel that adds to every token the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.inner.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.inner(tokens) + tokens.mean(1, keepdim=True)
        return mixed


class Transformer(nn.Module):
    """Two such blocks over pixels as tokens, and a classifier of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 1)
        self.blocks = nn.Sequential(Mix(), Mix())
        self.head = nn.Linear(1, OLD)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.embed(x.flatten(2).transpose(1, 2)))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


def test_prompts_run_beside_the_tokens() -> None:
    """Tokens 1 and 3, a prompt p = 5: one block gives 1 + 3, 3 + 3 and 5 + 3; without their sum, 4 and 6."""
    tokens, prompt = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[5.0]])
    first = Prompted(Mix(), prompt, removes=False)
    last = Prompted(Mix(), prompt, inserts=False)
    assert first(tokens).flatten().tolist() == [4, 8, 6]  # behind the first token
    assert last(first(tokens)).flatten().tolist() == [4 + 6, 6 + 6]  # shallow: the prompt's output runs on
    deep = Prompted(Mix(), prompt)
    assert deep(tokens).flatten().tolist() == [4, 6]
    assert deep(deep(tokens)).flatten().tolist() == [4 + 5, 6 + 5]  # deep: there is a fresh one


@pytest.mark.parametrize(("name", "kept"), [("shallow prompts", 1), ("deep prompts", 2), ("class prompts", 2)])
def test_prompts_are_put_into_a_transformer_alone(name: str, kept: int) -> None:
    given = replace(pictures(), target=Transformer())
    model = TUNING[name](given, replace(QUICK, prompts=4))
    prompted = [module for module in model.modules() if isinstance(module, Prompted)]
    sizes = [len(module.prompts) for module in prompted if module.prompts is not None]
    assert sizes == kept * [4 * (5 if name == "class prompts" else 1)]
    assert len(prompted) == 2
    assert torch.equal(model.embed.weight, given.target.embed.weight)
    with pytest.raises(InapplicableError, match="visual prompts: Small is not made of blocks that mix any number"):
        tune(TUNING[name], pictures(), [QUICK])


def test_a_parallel_patch_reads_what_its_block_reads() -> None:
    """A block that doubles; a patch of weights 3 and 5 over 1: 2 + 15 beside, and 2 + 30 behind."""
    for parallel, expected in ((True, 2.0 + 15), (False, 2.0 + 30)):
        block = nn.Linear(1, 1, bias=False)
        patched = Patched(block, torch.zeros(1, 1, 1), parallel=parallel)
        with torch.no_grad():
            block.weight.fill_(2.0)
            for tensor, value in zip(patched.patch.parameters(), (3.0, 0.0, 5.0, 0.0), strict=True):
                tensor.fill_(value)
        assert patched(torch.ones(1, 1, 1)).item() == expected


def test_no_patch_runs_beside_where_no_block_returns_what_it_reads() -> None:
    with pytest.raises(InapplicableError, match="parallel patches: no block of Small returns the shape that it reads"):
        TUNING["parallel patches"](pictures(), QUICK)
    assert TUNING["residual patches"](pictures(), QUICK)(pictures().train.images).shape == (20, 5)


def test_a_sum_of_bottlenecks_is_one_patch() -> None:
    """PeterRec's grouped patch: two bottlenecks of width 1 over eight channels, and one of width 2."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1, 3, 8, generator=generator)
    down, up = torch.randn(2, 1, 8, generator=generator), torch.randn(2, 8, 1, generator=generator)
    grouped = y + sum((y @ a.T).relu() @ b.T for a, b in zip(down, up, strict=True))
    patched = Patched(nn.Identity(), y)
    with torch.no_grad():
        for layer, weight in ((patched.patch[0], torch.cat([*down])), (patched.patch[2], torch.cat([*up], 1))):
            layer.weight.copy_(weight)
            layer.bias.zero_()
    torch.testing.assert_close(patched(y), grouped)


def test_a_class_has_the_weighted_similarity_of_its_tokens() -> None:
    similar = Similar(torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[-1.0, 0.0], [-1.0, 0.0]]]), 10.0)
    with torch.no_grad():
        similar.weights[0] = torch.tensor([3.0, 1.0]).log()
    scores = similar(torch.tensor([[6.0, 8.0]]))  # cosines 0.6 and 0.8 with the axes
    torch.testing.assert_close(scores, torch.tensor([[10 * (0.75 * 0.6 + 0.25 * 0.8), -6.0]]))


def test_features_learn_from_the_meta_loss_and_not_from_their_classifier() -> None:
    given = pictures()
    new = replace(given, train=replace(given.train, labels=given.train.labels.clamp_min(OLD)))
    for meta in (0.0, 1.0):
        model = merlin(new, replace(QUICK, meta=meta))
        assert isinstance(model, Represented)
        assert torch.equal(model.split.body.second.weight, given.target.second.weight) == (meta == 0)
        assert not torch.equal(model.split.linear.weight[:OLD], given.target.head.weight)


def wavy(classes: int, seed: int, shortcut: str) -> nn.Module:
    """A network whose channels are all active somewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(1, classes, depth=1, widths=(4, 6, 8), shortcut=shortcut).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5).mul_((torch.rand_like(module.weight) - 0.3).sign())
                module.bias.data.normal_(0, 0.1)
    return model


def shuffled(model: nn.Module) -> nn.Module:
    """The same network with the channels between the two convolutions of every block in another order."""
    other = copy.deepcopy(model)
    for block in (other.layer1[0], other.layer2[0], other.layer3[0]):
        order = torch.arange(block.conv1.out_channels).roll(1)
        for part in (block.conv1, block.bn1):
            for name, tensor in part.state_dict().items():
                if tensor.dim():
                    part.state_dict()[name].copy_(tensor[order].clone())
        block.conv2.weight.data = block.conv2.weight.data[:, order].clone()
    return other


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
def test_a_network_zipped_with_itself_in_another_order_is_itself(shortcut: str) -> None:
    """Every channel is averaged with its double, whatever the stage up to which both are one."""
    first = wavy(5, 0, shortcut)
    images = torch.randn(40, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    _measure_norms(first, images)
    second = shuffled(first)
    expected = first(images)
    torch.testing.assert_close(second(images), expected)
    merge = Merge(channel_groups(first, images[:2]), "linear", [first, second], images)
    trunk = merge.merged()
    _measure_norms(trunk, images)
    whole = merge.whole(trunk, [first.linear, second.linear], (4, 3))
    for model in (whole, *(merge.partial(trunk, at, (0, 1, 2, 3, 4), (4, 3)) for at in ("layer1", "layer2"))):
        torch.testing.assert_close(model(images), expected[:, [0, 1, 2, 3, 4, 4, 3]], rtol=1e-3, atol=1e-3)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (whole, first)]
    assert sizes[0] == sizes[1] + 2 * 9


def test_a_scale_goes_into_the_convolution_before_its_norm() -> None:
    """Weight 3 and bias 1 over a deviation of 2, with scale -4: a weight of -6, and a size of 4."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)).eval()
    with torch.no_grad():
        for tensor, value in zip((*model[0].parameters(), *model[1].parameters()), (3.0, 1.0, -4.0, 5.0), strict=True):
            tensor.fill_(value)
        model[1].running_var.fill_(4.0)
    state = _folded(model, torch.zeros(1, 1, 1, 1))
    assert [state[name].item() for name in ("0.weight", "0.bias", "1.weight", "1.bias")] == [-6, -2, 4, 5]


def test_networks_of_one_architecture_alone_are_zipped() -> None:
    given = pictures()
    with pytest.raises(InapplicableError, match="not of one architecture"):
        ENSEMBLES["ZipIt"](given, QUICK)
    images = torch.randn(20, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    data = Samples(images, torch.arange(20) % 5, "data")
    alike = Problem(wavy(OLD, 0, "conv"), wavy(6, 1, "conv"), (5, 3), train=data, validation=data)
    before = [tensor.clone() for tensor in alike.source.state_dict().values()]
    model = ENSEMBLES["ZipIt"](alike, QUICK)
    assert isinstance(model, Zipped)
    assert model(images).shape == (20, 5)
    assert all(map(torch.equal, before, alike.source.state_dict().values()))
