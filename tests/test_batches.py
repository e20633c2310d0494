"""Data as they come, in every form and of every wrong kind, for every function that takes some."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import netclone
from netclone.errors import DataError, NetcloneError
from netclone.graph.class_names import ClassNames
from netclone.learning.batches import batches
from netclone.learning.data import gather

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 4
NAMES = ("Grey_Heron", "ibis", "crow", "gull")
PAIRS = [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])]


class Samples(Dataset):
    """Single samples, made by a function."""

    def __init__(self, sample, count=12):
        self.sample, self.count = sample, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.sample(index % 12)  # never raises an IndexError


class Stream(IterableDataset):
    """Whatever it is given, one after the other."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def overwritten():
    """Batches in one and the same memory."""
    images, labels = torch.empty(3, 3, 8, 8), torch.empty(3, dtype=torch.long)
    for start in range(0, 12, 3):
        images.copy_(IMAGES[start : start + 3])
        labels.copy_(LABELS[start : start + 3])
        yield images, labels


def overwritten_arrays():
    images, labels = np.empty((3, 3, 8, 8), np.float32), np.empty(3, np.int64)
    for start in range(0, 12, 3):
        images[:], labels[:] = IMAGES[start : start + 3].numpy(), LABELS[start : start + 3].numpy()
        yield {"image": images, "label": labels}


def overwritten_samples():
    image = torch.empty(3, 8, 8)
    for index in range(12):
        yield image.copy_(IMAGES[index]), int(LABELS[index])


FORMS = {
    "one pair": lambda: (IMAGES, LABELS),
    "one pair in a list": lambda: [IMAGES, LABELS],
    "list of two batches": lambda: PAIRS,
    "tuple of two batches": lambda: tuple(PAIRS),
    "generator": lambda: (pair for pair in PAIRS),
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), 5),
    "map-style dataset": lambda: Samples(lambda i: (IMAGES[i], int(LABELS[i]))),
    "dataset of dictionaries": lambda: Samples(lambda i: {"pixel_values": IMAGES[i], "label": LABELS[i]}),
    "dataset with one-hot labels": lambda: Samples(lambda i: (IMAGES[i], nn.functional.one_hot(LABELS, 4)[i])),
    "part of a dataset": lambda: Subset(Samples(lambda i: (IMAGES[i], LABELS[i]), 40), range(12)),
    "tensor dataset": lambda: TensorDataset(IMAGES, LABELS),
    "stream of samples": lambda: Stream([(i, n) for i, n in zip(IMAGES, LABELS, strict=True)]),
    "stream of batches": lambda: Stream(PAIRS),
    "list of samples": lambda: [(i, int(n)) for i, n in zip(IMAGES, LABELS, strict=True)],
    "samples and batches": lambda: [(IMAGES[0], 0), (IMAGES[1:11], LABELS[1:11]), (IMAGES[11], 3)],
    "one dictionary": lambda: {"images": IMAGES, "labels": LABELS},
    "dictionaries": lambda: [{"pixel_values": i, "labels": n, "mask": None} for i, n in PAIRS],
    "arrays": lambda: (IMAGES.numpy(), LABELS.numpy()),
    "arrays that cannot be written": lambda: [tuple(map(frozen, pair)) for pair in PAIRS],
    "arrays in reverse order": lambda: (IMAGES.flip(0).numpy()[::-1], LABELS.flip(0).numpy()[::-1]),
    "one-hot": lambda: (IMAGES, nn.functional.one_hot(LABELS, 6)),
    "one-hot floats in an array": lambda: (IMAGES, np.eye(4)[LABELS.numpy()]),
    "lists of labels": lambda: [(i, n.tolist()) for i, n in PAIRS],
    **{
        f"labels of {kind}": lambda kind=kind: (IMAGES, LABELS.to(getattr(torch, kind)))
        for kind in ("uint8", "int8", "int16", "int32", "uint16")
    },
    "names": lambda: (IMAGES, [NAMES[n] for n in LABELS]),
    "names in an array": lambda: [(i, np.array([NAMES[n].upper() for n in m])) for i, m in PAIRS],
    "dictionaries with names": lambda: Samples(lambda i: {"image": IMAGES[i], "label": NAMES[LABELS[i]]}),
    "loader of names": lambda: DataLoader([(i, NAMES[n]) for i, n in zip(IMAGES, LABELS, strict=True)], 5),
    "lists of images": lambda: [{"image": list(i), "label": n} for i, n in PAIRS],
    "an empty batch among others": lambda: [PAIRS[0], (IMAGES[:0], LABELS[:0]), PAIRS[1]],
    "images with gradient": lambda: (IMAGES.clone().requires_grad_(), LABELS),
    "memory written over": overwritten,
    "arrays written over": overwritten_arrays,
    "samples written over": overwritten_samples,
}


def frozen(tensor):
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("form", FORMS)
def test_data_are_taken_in_every_form(form):
    samples = gather(FORMS[form](), names=ClassNames.given(["grey heron", "Ibis", "crow", "gull"], "source"))
    assert torch.equal(samples.images, IMAGES)
    assert torch.equal(samples.labels, LABELS)
    assert samples.labels.dtype == torch.long
    assert not samples.images.requires_grad
    assert samples.images.data_ptr() != IMAGES.data_ptr()


def test_batches_stay_as_they_are_and_samples_are_put_together():
    assert [len(labels) for _, labels in batches(PAIRS)] == [5, 7]
    many = TensorDataset(torch.zeros(130, 2), torch.zeros(130, dtype=torch.long))
    assert [len(labels) for _, labels in batches(many)] == [64, 64, 2]


def test_a_dataset_moves_no_random_state():
    before = torch.get_rng_state()
    gather(TensorDataset(IMAGES, LABELS))
    assert torch.equal(torch.get_rng_state(), before)


def raising():
    yield PAIRS[0]
    raise OSError("the disk is gone")


def spoilt(value):
    images = IMAGES.clone()
    images[3, 1, 2, 2] = value
    return images


WRONG = {
    "nothing": (lambda: [], "empty"),
    "a used generator": (lambda: iter(()), "a generator gives its batches once"),
    "empty batches": (lambda: [(IMAGES[:0], LABELS[:0])], "empty"),
    "a text": (lambda: "pictures", "got str; .*files are read by the command line"),
    "a number": (lambda: 5, "got int; expected an iterable"),
    "a function": (lambda: len, "got builtin_function_or_method"),
    "images alone": (lambda: IMAGES, "got Tensor; .*labels are missing"),
    "an array alone": (lambda: IMAGES.numpy(), "got ndarray"),
    "batches of images": (lambda: [IMAGES], r"batch 0 is Tensor; expected a pair"),
    "other keys": (lambda: {"x": IMAGES, "y": LABELS}, "keys 'x', 'y'; expected one of pixel_values"),
    "images without labels": (lambda: [{"image": IMAGES}], "expected .* one of labels, label"),
    "three in a batch": (lambda: [(IMAGES, LABELS, LABELS)], "tuple of 3"),
    "one in a batch": (lambda: [(IMAGES,)], "tuple of 1"),
    "images of two sizes in a list": (lambda: [([IMAGES[0], IMAGES[0, :, :4]], [0, 1])], "images of batch 0 are list"),
    "images None": (lambda: [(None, LABELS)], "images of batch 0 are NoneType"),
    "four channels": (lambda: (torch.rand(12, 4, 8, 8), LABELS), "images"),
    "another size": (lambda: (torch.rand(12, 3, 9, 9), LABELS), "images"),
    "no batch axis": (lambda: (torch.rand(12), LABELS), "expected"),
    "one axis too many": (lambda: (IMAGES[None].repeat(12, 1, 1, 1, 1), LABELS), "images"),
    "sizes that change": (lambda: [PAIRS[0], (torch.rand(7, 3, 9, 9), LABELS[5:])], "batch 1 has images .*batch 0 has"),
    "dtypes that change": (lambda: [PAIRS[0], (IMAGES[5:].double(), LABELS[5:])], "give all in one"),
    "samples of two sizes": (lambda: [(IMAGES[0], 0), (torch.rand(3, 9, 9), 1)], "sample 1 has .*sample 0 has"),
    "float64": (lambda: (IMAGES.double(), LABELS), "float64"),
    "float16": (lambda: (IMAGES.half(), LABELS), "float16"),
    "uint8": (lambda: ((IMAGES * 9).byte(), LABELS), r"torch.uint8: .*images.float\(\) / 255"),
    "integers": (lambda: (IMAGES.long(), LABELS), "int64"),
    "bool": (lambda: (IMAGES > 0, LABELS), "torch.bool: give floating"),
    "complex": (lambda: (IMAGES.to(torch.complex64), LABELS), "complex64"),
    "float8": (lambda: (IMAGES.to(torch.float8_e5m2), LABELS), "float8"),
    "texts in an array": (lambda: (np.full((12, 3, 8, 8), "x"), LABELS), "images of batch 0 are ndarray of <U1"),
    "NaN": (lambda: (spoilt(torch.nan), LABELS), "batch 0 holds 1 values that are NaN"),
    "infinite": (lambda: (spoilt(-torch.inf), LABELS), "infinite"),
    "sparse": (lambda: (IMAGES.to_sparse(), LABELS), r"sparse tensor .*to_dense\(\)"),
    "nested": (lambda: (nested(torch.strided), LABELS[:2]), "a nested tensor"),
    "jagged": (lambda: (nested(torch.jagged), LABELS[:2]), "a nested tensor"),
    "meta": (lambda: (IMAGES.to("meta"), LABELS), "on the meta device, without values"),
    "meta labels": (lambda: (IMAGES, LABELS.to("meta")), "labels of batch 0 are on the meta device"),
    "quantized": (lambda: (quantized(), LABELS), "quantized tensor"),
    "a generator that raises": (raising, "reading batch or sample 1 raised OSError: the disk is gone"),
    "a dataset that raises": (lambda: Samples(lambda i: 1 / 0), "sample 0 raised ZeroDivisionError"),
    "a dataset of batches": (lambda: Samples(lambda i: (IMAGES, LABELS)), "not one-hot"),
    "labels None": (lambda: (IMAGES, None), "labels of batch 0 are NoneType"),
    "labels bool": (lambda: (IMAGES, LABELS > 1), "labels of batch 0 are torch.bool; expected integer"),
    "labels float": (lambda: (IMAGES, LABELS.float()), "labels of batch 0 are torch.float32"),
    "labels complex": (lambda: (IMAGES, LABELS.to(torch.complex64)), "labels of batch 0 are torch.complex64"),
    "labels text": (lambda: (IMAGES, ["cat"] * 12), "'cat' is a name, and the .* records no class names; give columns"),
    "one text": (lambda: (IMAGES, "cats"), "labels of batch 0: 'cats' is a name"),
    "labels names and numbers": (
        lambda: (IMAGES[:2], ["cat", 1]),
        "labels of batch 0: some are names and others are not",
    ),
    "two kinds of labels": (
        lambda: [{"image": IMAGES, "label": LABELS, "labels": LABELS}],
        "both .labels. and .label.",
    ),
    "labels too few": (lambda: (IMAGES, LABELS[:5]), "labels"),
    "labels in a column": (lambda: (IMAGES, LABELS[:, None]), r"\(12, 1\); expected"),
    "labels soft": (lambda: (IMAGES, torch.full((12, 4), 0.25)), "not one-hot"),
    "labels of several classes": (lambda: (IMAGES, torch.ones(12, 4, dtype=torch.long)), "not one-hot"),
    "labels negative": (lambda: (IMAGES, LABELS - 1), "-1"),
    "labels too large": (lambda: (IMAGES, LABELS + 7), "label"),
    "labels huge": (lambda: (IMAGES, [2**70] * 12), "label"),
    "labels sparse": (lambda: (IMAGES, LABELS.to_sparse()), "sparse tensor"),
}


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these will go
        return torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8)


def nested(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these may change
        return torch.nested.as_nested_tensor([IMAGES[0], IMAGES[1]], layout=layout)


def network(classes=4):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(512, classes)).eval()


NETWORK = network()
GRAFTED = netclone.inject(
    network(3),
    netclone.extract(
        NETWORK,
        netclone.localize(NETWORK, method="magnitude", example_inputs=IMAGES[:2]),
        classes=[3],
        example_inputs=IMAGES[:2],
    ),
    at="input",
    example_inputs=IMAGES[:2],
)


def reconstruct(data, tmp_path):
    mask = netclone.localize(NETWORK, method="magnitude", example_inputs=IMAGES[:2])
    netclone.extract(NETWORK, mask, reconstruct=data, example_inputs=IMAGES[:2])


def report(data, tmp_path):
    from netclone.reporting.page import report

    report(GRAFTED, data, tmp_path / "page.html")


def clone(data, old):
    netclone.clone(NETWORK, network(), data, classes=[2], target_data=old, epochs=0, at="input", distill_steps=0)


FUNCTIONS = {
    "evaluate": lambda data, path: netclone.evaluate(NETWORK, data),
    "localize": lambda data, path: netclone.localize(NETWORK, data, classes=[2], method="taylor"),
    "clone": lambda data, path: clone(data, PAIRS),
    "target_data": lambda data, path: clone(PAIRS, data),
    "reconstruct": reconstruct,
    "report": report,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_data_are_a_data_error_that_says_what_was_seen(kind, function, tmp_path):
    make, message = WRONG[kind]
    data = make()
    with pytest.raises(DataError, match=message):
        FUNCTIONS[function](data, tmp_path)
    assert list(tmp_path.iterdir()) == []


RIGHT_EXAMPLES = {"images alone", "batches of images", "one text"}  # wrong for their labels alone


@pytest.mark.parametrize("kind", [k for k in WRONG if "labels" not in k and k not in RIGHT_EXAMPLES])
def test_wrong_example_inputs_are_typed_errors(kind):
    """Those that are no tensor, or one that no network takes; a tuple holds the one."""
    data = WRONG[kind][0]()
    example = data[0] if isinstance(data, tuple) and isinstance(data[0], (torch.Tensor, np.ndarray)) else data
    module = GRAFTED.get_submodule("clone")
    for call in (
        lambda: netclone.trace(NETWORK, example),
        lambda: netclone.localize(NETWORK, method="magnitude", example_inputs=example),
        lambda: netclone.inject(network(3), module, at="input", example_inputs=example),
    ):
        with pytest.raises(NetcloneError):
            call()


class Fussy(nn.Module):
    """Takes images of one kind of value."""

    def forward(self, images):
        if bool((images > 100).any()):
            raise ValueError("too bright\nby far")
        return images.flatten(1)[:, :4]


def test_what_a_forward_raises_names_the_batch_and_what_was_in_it():
    data = [(IMAGES, LABELS), (IMAGES + 200, LABELS)]
    message = r"data, batch of images 12 to 23: Fussy does not take images \(12, 3, 8, 8\) torch.float32 on cpu: "
    with pytest.raises(DataError, match=message + "ValueError: too bright;") as refused:
        netclone.evaluate(Fussy(), data, batch_size=12)
    assert isinstance(refused.value.__cause__, ValueError)


def test_the_message_says_what_the_parameters_are_where_they_differ():
    with pytest.raises(DataError, match="its parameters are torch.float32 on cpu"):
        netclone.evaluate(NETWORK, (IMAGES.double(), LABELS))


def test_memory_that_is_not_enough_is_no_fault_of_the_data():
    class Hungry(nn.Module):
        def forward(self, images):
            raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError):
        netclone.evaluate(Hungry(), (IMAGES, LABELS))


@pytest.mark.parametrize("form", ["map-style dataset", "dictionaries", "memory written over", "arrays", "one-hot"])
def test_a_form_changes_no_result(form):
    given = {"at": "input", "epochs": 1, "distill_steps": 2, "method": "magnitude", "classes": [2], "keep": 0.9}
    want, got = (
        netclone.clone(NETWORK, network(3), data, target_data=[(IMAGES, LABELS % 3)], **given).state_dict()
        for data in (PAIRS, FORMS[form]())
    )
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert netclone.evaluate(NETWORK, FORMS[form]()) == netclone.evaluate(NETWORK, PAIRS)
