"""Grafted models where models are used: in half precision, channels last, and by timm's validation and averaging."""

import copy

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, freeze, unfreeze, unwrap_model
from torch import nn

from netclone import clone, extract, inject, localize, remove
from netclone.graph.tracing import same_bits

PAIRS = [  # target, source: CNN into CNN, ViT into CNN, CNN into ViT
    ("resnet10t", "test_efficientnet"),
    ("mobilenetv3_small_050", "test_vit"),
    ("test_vit", "resnet10t"),
]
TOLERANCE = {torch.bfloat16: 1e-1, torch.float16: 1e-2}
"""How far new logits may be from those in float32, as a share of the largest of these. Old ones may not be at all from
those of the target in the same dtype."""


def network(name, classes, seed):
    """Random weights, with statistics that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        size = {"img_size": 64} if "vit" in name else {}
        model = timm.create_model(name, num_classes=classes, **size)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
            if isinstance(module, nn.Linear):
                module.weight.data.normal_(0, module.in_features**-0.5)
        return model.eval()


def images(count=4, seed=3):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(
    scope="module",
    params=[PAIRS[0], *(pytest.param(pair, marks=pytest.mark.long) for pair in PAIRS[1:])],
    ids=" <- ".join,
)
def pair(request):
    """A target, and it with half of another network at its input."""
    target, source = network(request.param[0], 5, 1), network(request.param[1], 6, 2)
    mask = localize(source, method="magnitude", keep=0.5, example_inputs=images(2))
    module = extract(source, mask, classes=[1, 3], class_names=["heron", "ibis"], example_inputs=images(2))
    return target, inject(target, module, at="input", name="birds", example_inputs=images(2))


@pytest.fixture(scope="module")
def fitted():
    """A target, and it with a clone that reads its features and its logits through an adapter."""
    target, source = network("test_resnet", 5, 1), network("test_resnet", 6, 2)
    with torch.no_grad():  # a source that takes images for different classes, not all for one
        source.fc.bias -= source(images(64)).mean(0)
    data = [(images(16, seed), torch.arange(16) % 2 * 2 + 1) for seed in range(2)]
    old = [(images(16, seed), torch.arange(16) % 5) for seed in range(2, 4)]
    options = {"classes": [1, 3], "at": "layer2", "epochs": 1, "distill_steps": 2, "batch_size": 8}
    module = clone(source, target, data, target_data=old, method="magnitude", budget="channels", **options)
    return target, inject(target, module, name="birds", example_inputs=images(2))


def check_in(dtype, target, grafted):
    x = images().to(dtype)
    with torch.no_grad():
        reference = grafted(images())[:, 5:]
        want, got = copy.deepcopy(target).to(dtype)(x), copy.deepcopy(grafted).to(dtype)(x)
    assert got.dtype == dtype
    assert same_bits(got[:, :5], want)
    error = (got[:, 5:].float() - reference).abs().max() / reference.abs().max()
    assert 0 < error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_half_precision_keeps_old_logits_to_the_bit_and_new_ones_within_tolerance(pair, dtype):
    check_in(dtype, *pair)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_half_precision_of_a_clone_with_an_adapter(fitted, dtype):
    check_in(dtype, *fitted)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_injecting_in_half_precision_is_half_precision_of_injecting(pair, dtype):
    target, grafted = pair
    module = copy.deepcopy(grafted.birds).to(dtype)
    half = copy.deepcopy(target).to(dtype)
    late = inject(half, module, at="input", name="birds", example_inputs=images(2).to(dtype))
    x = images().to(dtype)
    with torch.no_grad():
        assert same_bits(late(x), copy.deepcopy(grafted).to(dtype)(x))
        assert same_bits(remove(late)(x), half(x))


def check_channels_last(target, grafted):
    x = images().to(memory_format=torch.channels_last)
    last = [copy.deepcopy(model).to(memory_format=torch.channels_last) for model in (target, grafted)]
    with torch.no_grad():
        reference = grafted(images())[:, 5:]
        for of_target, of_grafted in ((target, grafted), last):
            want, got = of_target(x), of_grafted(x)
            assert same_bits(got[:, :5], want)
            assert (got[:, 5:] - reference).abs().max() < 1e-4 * reference.abs().max()
        back = remove(last[1])
        assert same_bits(back(x), last[0](x))
    kept = {name: tensor.stride() for name, tensor in last[0].state_dict().items()}
    assert {name: tensor.stride() for name, tensor in back.state_dict().items()} == kept


@pytest.mark.slow
def test_compiled_it_is_one_graph_with_the_targets_own_logits(pair):
    """Inductor's kernels are compared in examples/benchmarks/deployment.py: compiling them takes minutes."""
    target, grafted = pair
    torch.compiler.reset()
    compiled, alone = (torch.compile(model, fullgraph=True, backend="aot_eager") for model in (grafted, target))
    with torch.no_grad():
        got, want = compiled(images()), grafted(images())
        assert same_bits(got[:, :5], alone(images()))
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    torch.compiler.reset()


def test_channels_last_input_and_model(pair):
    check_channels_last(*pair)


def test_channels_last_of_a_clone_with_an_adapter(fitted):
    check_channels_last(*fitted)


def test_an_average_of_weights_moves_the_clone_and_nothing_of_the_target(pair):
    target, grafted = pair
    model = copy.deepcopy(grafted).train()
    average = ModelEmaV3(model, decay=0.75)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-4)
    nn.functional.cross_entropy(model(images()), torch.tensor([0, 4, 5, 6])).backward()
    optimizer.step()
    average.update(model)
    moved = 0
    for name, value in average.module.state_dict().items():
        now = model.state_dict()[name]
        if name.startswith("birds."):
            torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * now)
            moved += not same_bits(value, start[name])
        else:
            assert same_bits(value, start[name]) and same_bits(now, start[name])
    assert moved > 3
    assert average.module.num_classes == 7
    with torch.no_grad():
        assert same_bits(average(images())[:, :5], target(images()))
        assert same_bits(remove(average.module)(images()), target(images()))


@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning"
)  # timm's data set leaves it to the garbage collector
def test_timms_validation_loop(pair, tmp_path):
    target, grafted = pair
    generator = torch.Generator().manual_seed(0)
    for label in range(7):
        folder = tmp_path / f"class{label}"
        folder.mkdir()
        for index in range(2):
            pixels = torch.randint(256, (72, 80, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    config = resolve_data_config(model=grafted, args={"img_size": 64})
    assert config == resolve_data_config(model=target, args={"img_size": 64})
    assert config["mean"] == target.pretrained_cfg["mean"]
    dataset = create_dataset("", root=tmp_path)
    options = {"use_prefetcher": False, "num_workers": 0, "device": torch.device("cpu")}
    loader = create_loader(dataset, batch_size=4, is_training=False, **options, **config)
    first, fifth = AverageMeter(), AverageMeter()
    with torch.no_grad():
        for x, labels in loader:
            output = grafted(x)
            assert output.shape == (len(x), grafted.num_classes)
            one, five = accuracy(output, labels, topk=(1, 5))
            first.update(one.item(), len(x))
            fifth.update(five.item(), len(x))
    again = create_dataset("", root=tmp_path, transform=create_transform(**config))
    pictures, labels = zip(*(again[index] for index in range(len(again))), strict=True)
    labels = torch.tensor(labels)
    with torch.no_grad():
        order = grafted(torch.stack(pictures)).argsort(1, descending=True)
    hits = order == labels[:, None]
    assert first.count == len(labels) == 14
    assert first.avg == pytest.approx(100 * hits[:, 0].float().mean().item(), abs=1e-3)
    assert fifth.avg == pytest.approx(100 * hits[:, :5].any(1).float().mean().item(), abs=1e-3)


def test_freezing_by_name_is_about_the_clone_alone(pair):
    model = copy.deepcopy(pair[1])
    freeze(model, "birds")
    assert not any(parameter.requires_grad for parameter in model.birds.parameters())
    unfreeze(model, "birds")
    assert all(parameter.requires_grad for parameter in model.birds.parameters())
    others = {name: p.requires_grad for name, p in model.named_parameters() if not name.startswith("birds.")}
    assert others == {name: p.requires_grad for name, p in pair[0].named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_goes_through_a_file(pair, dtype, tmp_path):
    target, grafted = pair
    grafted = copy.deepcopy(grafted).to(dtype)
    torch.save(grafted.state_dict(), tmp_path / "grafted.pt")
    other = copy.deepcopy(grafted)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "grafted.pt", weights_only=True))
    x = images().to(dtype)
    with torch.no_grad():
        assert same_bits(other(x), grafted(x))
    plain = copy.deepcopy(target).to(dtype)
    plain.load_state_dict(remove(other).state_dict())
    with torch.no_grad():
        assert same_bits(plain(x), other(x)[:, :5])


def test_copies_and_wrappers_compute_the_same_and_unwrap(pair):
    _, grafted = pair
    with torch.no_grad():
        want = grafted(images())
        for model in (copy.deepcopy(grafted), nn.DataParallel(grafted), copy.deepcopy(nn.DataParallel(grafted))):
            assert same_bits(model(images()), want)
            inner = unwrap_model(model)
            assert inner.num_classes == 7
            assert inner.pretrained_cfg["num_classes"] == 7
            assert not inner.train().layer1.training if hasattr(inner, "layer1") else inner.eval() is inner
            inner.eval()
