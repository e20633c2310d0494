"""isolated: threads that run networks do not notice a capture, captures wait for each other, torch is put back."""

import contextlib
import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from timm.layers import get_notrace_functions
from torch import fx, nn

import netclone
from netclone.errors import TraceError
from netclone.graph.capturing import capture
from netclone.graph.isolation import isolated

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Pausing(nn.Module):
    """Waits in forward() while it is captured (not while it runs), as often as it is."""

    def __init__(self, events=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.events = events if events is not None else []

    def __deepcopy__(self, memo):
        copied = Pausing(self.events)
        copied.load_state_dict(self.state_dict())
        return copied.train(self.training)

    def forward(self, x):
        if isinstance(x, fx.Proxy) or torch.compiler.is_exporting():
            for event in self.events:
                event()
        return (self.conv(x) * self.scale).flatten(1)


CAPTURES = {"trace": netclone.trace, "capture": capture}
both = pytest.mark.parametrize("kind", list(CAPTURES))


@contextlib.contextmanager
def paused(kind):
    """A capture of either kind that stands still inside forward(), in a thread of its own."""
    inside, go_on, errors = threading.Event(), threading.Event(), []
    model = Pausing([inside.set, lambda: go_on.wait(60)]).eval()

    def work():
        try:
            CAPTURES[kind](model, IMAGES)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    try:
        yield
    finally:
        go_on.set()
        thread.join()
    assert not errors, errors


def buffers(x):
    """A module that assigns a buffer in forward()."""

    class Assigning(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(2, 5, 16))

        def forward(self, x):
            self.last = x + 1
            return self.last

    return Assigning()(x)


@both
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    ("model", "given"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), IMAGES),
        (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), TOKENS),
        (nn.LSTM(16, 8, batch_first=True), TOKENS),
        (fx.symbolic_trace(nn.Sequential(nn.Linear(16, 4))), TOKENS),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), IMAGES),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_run_bitwise_as_ever_while_another_thread_captures(model, given, gradients, kind):
    model.eval()
    with torch.set_grad_enabled(gradients):
        want = model(given)
        with paused(kind):
            got = model(given)
    for one, other in zip(flat(got), flat(want), strict=True):
        assert torch.equal(one, other)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [part for inner in value for part in flat(inner)]


@both
def test_other_threads_see_torch_as_it_is(kind):
    with paused(kind):
        assert not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        assert torch._C._get_mkldnn_enabled()
        assert torch.equal(buffers(TOKENS), TOKENS + 1)
        assert not torch.nn.modules.module._global_buffer_registration_hooks
        assert nn.Linear(4, 2).weight.shape == (2, 4)  # through nn.Module.__getattr__
        with pytest.raises(AttributeError, match="'Linear' object has no attribute 'wight'"):
            _ = nn.Linear(4, 2).wight
        assert TOKENS[0].shape == (5, 16)


def test_captures_wait_for_each_other():
    seen, started = [], threading.Event()

    def note(what):
        return lambda: seen.append(what)

    first = Pausing([note("first in"), lambda: started.wait(60), note("first out")])
    second = Pausing([note("second in"), note("second out")])

    def work():
        started.set()
        netclone.trace(second, IMAGES)

    one = threading.Thread(target=netclone.trace, args=(first, IMAGES))
    other = threading.Thread(target=work)
    one.start()
    while not seen:
        one.join(0.001)
    other.start()
    one.join()
    other.join()
    entered, left = seen[::2], seen[1::2]  # several times each: a model is traced in either mode
    assert entered[0] == "first in" and "second in" in entered
    assert [name.replace("in", "out") for name in entered] == left


def test_the_thread_that_captures_need_not_wait_for_itself():
    with isolated():
        graph = netclone.trace(nn.Sequential(nn.Flatten()), IMAGES)
    assert torch.equal(graph(IMAGES), IMAGES.flatten(1))


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("no forward")


def pieces():
    """What tracing replaces while it lasts."""
    return {
        "call": nn.Module.__call__,
        "getattr": nn.Module.__getattr__,
        "getitem": torch.Tensor.__getitem__,
        "patcher": fx._symbolic_trace._Patcher,
        "compiling": torch.compiler._is_compiling_flag,
        "exporting": torch.compiler._is_exporting_flag,
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "convolution": torch._C._select_conv_backend,
        "wrapped": [function.__globals__[function.__name__] for function in get_notrace_functions()],
        **{name: getattr(torch.export._trace, name) for name in REPLACED},
    }


REPLACED = ("_compiling_state_context", "_ignore_backend_decomps", "register_buffer_assignment_hook")


@pytest.mark.parametrize("model", [Pausing(), Failing()], ids=["well", "failing"])
def test_torch_is_put_back(model):
    before = pieces()
    try:
        netclone.trace(model, IMAGES)
        capture(model, IMAGES)
    except TraceError:
        assert isinstance(model, Failing)
    assert pieces() == before


def test_a_trace_of_torchs_own_works_inside():
    with isolated():
        graph = fx.symbolic_trace(nn.Sequential(nn.Linear(16, 4), nn.ReLU()))
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


class TwoInputs(nn.Module):
    def __init__(self, middle, channels):
        super().__init__()
        self.middle = middle
        self.linear = nn.Linear(3, channels)

    def forward(self, x, y):
        return self.middle(x).flatten(2).mean(2) + self.linear(y)


@pytest.mark.parametrize(
    ("middle", "sizes"),
    [
        (nn.Conv2d(8, 8, 1), (12, 12)),
        (nn.Conv2d(8, 8, 5, groups=8), (12, 12)),
        (nn.ConvTranspose2d(8, 8, 3), (6, 6)),
        (nn.Conv1d(8, 8, 1), (12,)),
        (nn.Conv3d(8, 8, 1), (4, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_kernel_fixes_the_batch_size_of_a_capture(middle, sizes, memory_format):
    images = torch.randn(2, 8, *sizes)
    if images.dim() == 4:
        images = images.contiguous(memory_format=memory_format)
    model = TwoInputs(middle, 8).eval()
    graph = capture(model, images, torch.randn(2, 3))
    more = images.repeat(20, *[1] * (images.dim() - 1)), torch.randn(40, 3)
    with torch.no_grad():
        torch.testing.assert_close(graph(*more), model(*more))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_the_benchmark_of_threads_finds_no_failure():
    path = Path(__file__).parents[1] / "examples" / "benchmarks" / "threads.py"
    spec = importlib.util.spec_from_file_location("threads", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.run(1.5)
    assert found["forwards"] and not found["failures"] and not found["other_bits"], found["first"]
    assert found["torch_restored"]
