"""to_onnx(model, path) and to_pt2(model, path): export a network, grafted or not, for other runtimes."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from netclone.errors import ArgumentError, DataError, OutputError, TraceError, first_line
from netclone.graph.isolation import isolated
from netclone.graph.tracing import example_input
from netclone.metrics.evaluating import predict
from netclone.runtime.writing import check_place, write_file

TOLERANCE = {"onnx": 1e-4, "pt2": 0.0}
"""How far an exported file's logits may differ from the network's, as a share of the largest logit."""

Run = Callable[[Tensor], Tensor]
"""Runs an exported file: images to logits."""

BATCHES = (1, 3)
"""Batch sizes that an exported file is tried with; it is exported with another one."""


@dataclass(frozen=True)
class Translation:
    """An exported file: its size, and max |its logits - the network's| / max |the network's|; None if not compared."""

    path: Path
    bytes: int
    difference: float | None


def to_onnx(model: nn.Module, path: Path, example_inputs: Tensor | tuple[Tensor] | None = None) -> Translation:
    """Write a network as ONNX, for any batch size, and compare the logits that onnxruntime computes from it.

    The graph takes ``images (N, C, H, W)`` and returns ``logits (N, classes)``. The weights are in the file.

    Parameters
    ----------
    example_inputs
        A batch of images. May be left out if the model records their size.

    Raises
    ------
    ArgumentError
        If onnxscript is not installed, or an example is needed.
    TraceError
        If the network cannot be exported, or the file gives other logits.
    ArchiveError
        If the file cannot be written; ONNX holds at most 2 GiB in one.

    Examples
    --------
    >>> import tempfile, timm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_onnx(timm.create_model("test_resnet", num_classes=4), Path(folder, "model.onnx")).difference < 1e-5
    True
    """
    try:
        import onnxscript  # noqa: F401  what torch exports with
    except ImportError as error:
        raise ArgumentError("to: onnx needs onnxscript, which is missing: pip install 'netclone[onnx]'") from error
    check_place(path)
    plain, example = _prepared(model, example_inputs)
    with _quiet():
        try:
            program = torch.onnx.export(
                plain,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
            assert program is not None
            content = program.model_proto.SerializeToString()
        except Exception as error:  # of torch's exporter and of protobuf, which holds no more than 2 GiB
            raise TraceError(f"to: onnx: {type(error).__name__}: {first_line(error)}") from error
    difference = _compared(plain, example, _onnxruntime(content), "onnx")
    write_file(path, content)
    return Translation(path, len(content), difference)


def to_pt2(model: nn.Module, path: Path, example_inputs: Tensor | tuple[Tensor] | None = None) -> Translation:
    """Write a network as an archive of torch.export, for any batch size, and compare the logits of the file.

    Parameters
    ----------
    example_inputs
        A batch of images. May be left out if the model records their size.

    Raises
    ------
    ArgumentError
        If an example is needed.
    TraceError
        If the network cannot be exported, or the file gives other logits.
    ArchiveError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, timm
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_pt2(timm.create_model("test_resnet", num_classes=4), Path(folder, "model.pt2")).difference
    0.0
    """
    check_place(path)
    plain, example = _prepared(model, example_inputs)
    buffer = io.BytesIO()
    with _quiet():
        try:
            program = torch.export.export(plain, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(program, buffer)
            buffer.seek(0)
            back = torch.export.load(buffer).module()
        except Exception as error:  # of torch's exporter
            raise TraceError(f"to: pt2: {type(error).__name__}: {first_line(error)}") from error
    difference = _compared(plain, example, back, "pt2")
    write_file(path, buffer.getvalue())
    return Translation(path, len(buffer.getvalue()), difference)


def _prepared(model: nn.Module, example_inputs: Tensor | tuple[Tensor] | None) -> tuple[nn.Module, Tensor]:
    """A copy in eval mode, and a batch of two."""
    example = example_input(model, example_inputs)
    return copy.deepcopy(model).eval(), example


def _onnxruntime(content: bytes) -> Run | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own for everything
        raise TraceError(f"to: onnxruntime cannot load what torch exported: {first_line(error)}") from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _compared(model: nn.Module, example: Tensor, run: Run | None, kind: str) -> float | None:
    """max |logits of the file - logits| / max |logits| over batches of other sizes than the example's."""
    if run is None:
        return None
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for size in BATCHES:
        images = torch.randn(size, *example.shape[1:], generator=generator).to(example.dtype)
        try:
            want = predict(model, images)
        except (DataError, OutputError) as error:
            raise TraceError(f"to: {kind}: the network does not run with a batch of {size}: {error}") from error
        try:
            with torch.no_grad():
                got = run(images)
        except Exception as error:  # of any runtime
            raise TraceError(
                f"to: {kind}: the file does not run with a batch of {size}: {first_line(error)}"
            ) from error
        if got.shape != want.shape:
            raise TraceError(
                f"to: {kind}: the file gives {tuple(got.shape)} for {size} images, not {tuple(want.shape)}"
            )
        worst = max(worst, float((got - want).abs().amax() / want.abs().amax().clamp_min(1e-12)))
    if not worst <= TOLERANCE[kind]:
        raise TraceError(
            f"to: {kind}: logits of the file differ by {worst:.1e} of the largest, more than {TOLERANCE[kind]:.0e}; "
            "nothing was written"
        )
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings about their internals; the result is checked anyway."""
    with isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
