"""to_onnx, to_int8_onnx, to_pt2, to_aoti and to_openvino: export a network, grafted or not, for other runtimes."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from netclone.cloning.grafted import GraftedModule
from netclone.errors import ArchiveError, ArgumentError, DataError, OutputError, TraceError, first_line
from netclone.graph.isolation import isolated
from netclone.graph.preparing import preparation
from netclone.graph.tracing import example_input
from netclone.metrics.evaluating import predict
from netclone.metrics.skipping import ungated
from netclone.models.reading import read
from netclone.runtime.writing import check_place, write_file

TOLERANCE, OF_PT2 = 1e-4, 0.0
"""How far an exported file's logits may differ from the network's, as a share of the largest logit.

torch.export's archive runs the network's own operators. A clone with a gate computes on smaller batches than a file, so
that its rounding may differ: its archive is taken as the other formats are.
"""

Run = Callable[[Tensor], Tensor]
"""Runs an exported file: images to logits."""

_CALIBRATED = 8  # images at a time

BATCHES = (1, 3)
"""Sizes of batches of noise that an exported file is tried with; it is exported with another one."""


@dataclass(frozen=True)
class Translation:
    """An exported file: its size, and max |its logits - the network's| / max |the network's|; None if not compared.

    ``agreement`` is the share of images that a file of int8 takes for the same class as the network does.
    """

    path: Path
    bytes: int
    difference: float | None
    agreement: float | None = None


def to_onnx(
    model: nn.Module,
    path: Path,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    images: Tensor | None = None,
) -> Translation:
    """Write a network as ONNX, for any batch size, and compare the logits that onnxruntime computes from it.

    The graph takes ``images (N, C, H, W)`` and returns ``logits (N, classes)``. The weights are in the file.

    Parameters
    ----------
    example_inputs
        A batch of images. May be left out if the model records their size.
    images
        Images ``(N, C, H, W)`` to compare the logits on, beside batches of noise.

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
    check_place(path)
    plain, example = _prepared(model, example_inputs)
    content = _onnx(plain, example)
    difference = _compared(plain, example, _onnxruntime(content), "onnx", images)
    write_file(path, content)
    return Translation(path, len(content), difference)


def to_int8_onnx(model: nn.Module, path: Path, images: Tensor) -> Translation:
    """Write a network as ONNX whose convolutions and products compute in int8, calibrated on images ``(N, C, H, W)``.

    onnxruntime quantises it: weights for each channel, activations by the ranges that every second image gives. The
    others measure what that changed. How much may be changed is for the caller to say, who gets the figures.

    Raises
    ------
    ArgumentError
        If onnxscript or onnxruntime is not installed, there are fewer than two images, or a clone has a gate.
    TraceError
        If the network cannot be exported or quantised, or the file before that gives other logits.
    ArchiveError
        If the file cannot be written.

    Examples
    --------
    >>> import tempfile, timm
    >>> network, images = timm.create_model("test_resnet", num_classes=4), torch.randn(4, 3, 160, 160)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_int8_onnx(network, Path(folder, "model.onnx"), images).difference < 0.2
    True
    """
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    except ImportError as error:
        raise ArgumentError("int8: needs onnxruntime, which is missing: pip install 'netclone[onnx]'") from error
    if len(images) < 2:
        raise ArgumentError(f"images: got {len(images)}, expected some to calibrate with and some to measure on")
    if _has_gate(model):
        raise ArgumentError(
            "int8: a clone has a gate, and no scale of int8 reaches to the minus infinity of images that it does not "
            "see; leave out --int8, or clone without --gate"
        )
    check_place(path)
    plain, example = _prepared(model, images[:1])
    content = _onnx(plain, example)
    _compared(plain, example, _onnxruntime(content), "onnx")

    class Calibration(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images[::2].split(_CALIBRATED))

        def get_next(self) -> dict[str, object] | None:
            part = next(self.left, None)
            return None if part is None else {"images": part.numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole, small = Path(folder, "whole.onnx"), Path(folder, "small.onnx")
        whole.write_bytes(content)
        try:
            quantize_static(whole, small, Calibration(), per_channel=True, weight_type=QuantType.QInt8)
            content = small.read_bytes()
        except Exception as error:  # of onnxruntime, which has many
            raise TraceError(f"int8: onnxruntime: {type(error).__name__}: {first_line(error)}") from error
    run = _onnxruntime(content)
    assert run is not None
    want, got = predict(plain, images[1::2]), run(images[1::2])
    write_file(path, content)
    return Translation(
        path, len(content), _difference(got, want), float((got.argmax(1) == want.argmax(1)).float().mean())
    )


def some_images(network: nn.Module, data: str, split: str, most: int = 128) -> Tensor:
    """At most so many named images, as a network takes them (see :func:`netclone.models.reading.read`).

    Raises
    ------
    NetcloneError
        As :func:`netclone.models.reading.read`.
    """
    found: list[Tensor] = []
    for images, _ in read(data, preparation(network).transform(), split, "data", _CALIBRATED):
        found.append(images)
        if len(found) * _CALIBRATED >= most:
            break
    return torch.cat(found)[:most]


def _onnx(plain: nn.Module, example: Tensor) -> bytes:
    """A network as ONNX, which takes ``images`` and gives ``logits``, for any batch size."""
    _check_package("onnxscript", "onnx")  # what torch exports with
    with _quiet(), _converting("onnx"):  # protobuf holds no more than 2 GiB
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
        content: bytes = program.model_proto.SerializeToString()
    return content


def to_pt2(
    model: nn.Module,
    path: Path,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    images: Tensor | None = None,
) -> Translation:
    """Write a network as an archive of torch.export, for any batch size, and compare the logits of the file.

    Parameters
    ----------
    example_inputs
        A batch of images. May be left out if the model records their size.
    images
        Images ``(N, C, H, W)`` to compare the logits on, beside batches of noise.

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
    program = _program(plain, example, "pt2")
    with _quiet(), _converting("pt2"):
        torch.export.save(program, buffer)
        buffer.seek(0)
        back = torch.export.load(buffer).module()
    difference = _compared(plain, example, back, "pt2", images, TOLERANCE if _has_gate(model) else OF_PT2)
    write_file(path, buffer.getvalue())
    return Translation(path, len(buffer.getvalue()), difference)


def to_aoti(
    model: nn.Module,
    path: Path,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    images: Tensor | None = None,
) -> Translation:
    """Write a network as a package of AOTInductor, compiled for this kind of CPU, and compare the logits of the file.

    ``torch._inductor.aoti_load_package`` runs it for any batch size, in Python and, with the same name, in C++.

    Parameters
    ----------
    example_inputs, images
        As for :func:`to_onnx`.

    Raises
    ------
    ArgumentError
        If there is no C++ compiler, the name does not end in ``.pt2``, or an example is needed.
    TraceError
        If the network cannot be exported or compiled, or the file gives other logits.
    ArchiveError
        If the file cannot be written.

    Reference: torch ``aoti_compile_and_package``.
    """
    check_format("aoti", path)
    plain, example = _prepared(model, example_inputs)
    program = _program(plain, example, "aoti")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.pt2")
        with _silent(), torch.no_grad(), _converting("aoti"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
            run = torch._inductor.aoti_load_package(str(file))
        difference = _compared(plain, example, run, "aoti", images)
        content = file.read_bytes()
    write_file(path, content)
    return Translation(path, len(content), difference)


def to_openvino(
    model: nn.Module,
    path: Path,
    example_inputs: Tensor | tuple[Tensor] | None = None,
    images: Tensor | None = None,
) -> Translation:
    """Write a network for OpenVINO, as ``model.xml`` with its weights beside it in ``model.bin``, and compare.

    The model takes ``images (N, C, H, W)`` and returns ``logits (N, classes)``, for any batch size, in float32.

    Parameters
    ----------
    example_inputs, images
        As for :func:`to_onnx`.

    Raises
    ------
    ArgumentError
        If openvino is not installed, the name does not end in ``.xml``, or an example is needed.
    TraceError
        If the network cannot be exported, or the files give other logits.
    ArchiveError
        If a file cannot be written; neither is then changed.

    Reference: OpenVINO ``convert_model``, ``save_model``.
    """
    check_format("openvino", path)
    import openvino  # an extra, which is there

    weights = path.with_suffix(".bin")
    plain, example = _prepared(model, example_inputs)
    program = _program(plain, example, "openvino")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        with _silent(), _converting("openvino"):
            converted = openvino.convert_model(program)
            converted.reshape([-1, *example.shape[1:]])
            converted.inputs[0].get_tensor().set_names({"images"})
            converted.outputs[0].get_tensor().set_names({"logits"})
            openvino.save_model(converted, file, compress_to_fp16=False)
            loaded = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        difference = _compared(
            plain, example, lambda given: torch.from_numpy(loaded(given.numpy())["logits"]), "openvino", images
        )
        parts = file.read_bytes(), file.with_suffix(".bin").read_bytes()
    before = weights.read_bytes() if weights.exists() else None
    write_file(weights, parts[1])
    try:
        write_file(path, parts[0])
    except ArchiveError:
        weights.unlink() if before is None else write_file(weights, before)
        raise
    return Translation(path, sum(map(len, parts)), difference)


WRITERS = {"onnx": to_onnx, "pt2": to_pt2, "aoti": to_aoti, "openvino": to_openvino}
"""What writes a format, by its name on the command line."""


def check_format(kind: str, path: Path) -> None:
    """Raise unless a file of this format can be written here: before a network is loaded for it.

    Raises
    ------
    ArgumentError
        If a package or a compiler is missing, or the file's name is not one that the format can have.
    ArchiveError
        If there is no such folder, or it cannot be written to.
    """
    if kind == "onnx":
        _check_package("onnxscript", "onnx")
    if kind == "aoti":
        _check_suffix(path, ".pt2", "torch loads a package only from a file that is called so")
        _check_compiler()
    if kind == "openvino":
        _check_suffix(path, ".xml", "OpenVINO finds the weights beside it, in a file of the same name in .bin")
        _check_package("openvino", "openvino")
        check_place(path.with_suffix(".bin"))
    check_place(path)


def _check_package(name: str, kind: str) -> None:
    """Raise unless a package of ours that a format needs can be imported; the extra has the format's name."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ArgumentError(f"to: {kind} needs {name}, which is missing: pip install 'netclone[{kind}]'") from error


def _check_suffix(path: Path, suffix: str, why: str) -> None:
    if path.suffix != suffix:
        raise ArgumentError(f"out: got '{path.name}', expected a name that ends in '{suffix}': {why}")


def _check_compiler() -> None:
    """Raise unless there is a C++ compiler that torch would use.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import

    try:
        get_cpp_compiler()
    except Exception as error:
        raise ArgumentError(
            "to: aoti needs a C++ compiler, and torch finds none: install g++ or clang, or name one in CXX"
        ) from error


def _program(plain: nn.Module, example: Tensor, kind: str) -> torch.export.ExportedProgram:
    """A network as torch exports it, for any batch size."""
    with _quiet(), _converting(kind):
        return torch.export.export(plain, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@contextmanager
def _converting(kind: str) -> Iterator[None]:
    """Raise a TraceError that names the format for any error of a converter, of which each has its own."""
    try:
        yield
    except Exception as error:
        raise TraceError(f"to: {kind}: {type(error).__name__}: {first_line(error)}") from error


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


def _has_gate(model: nn.Module) -> bool:
    return isinstance(model, GraftedModule) and ungated(model) is not model


def _compared(
    model: nn.Module,
    example: Tensor,
    run: Run | None,
    kind: str,
    images: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> float | None:
    """max |logits of the file - logits| / max |logits| over batches of other sizes than the example's, and images."""
    if run is None:
        return None
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    batches = [torch.randn(size, *example.shape[1:], generator=generator).to(example.dtype) for size in BATCHES]
    for batch in (*batches, *(() if images is None else images.split(_CALIBRATED))):
        size = len(batch)
        try:
            want = predict(model, batch)
        except (DataError, OutputError) as error:
            raise TraceError(f"to: {kind}: the network does not run with a batch of {size}: {error}") from error
        try:
            with torch.no_grad():
                got = run(batch)
        except Exception as error:  # of any runtime
            raise TraceError(
                f"to: {kind}: the file does not run with a batch of {size}: {first_line(error)}"
            ) from error
        if got.shape != want.shape:
            raise TraceError(
                f"to: {kind}: the file gives {tuple(got.shape)} for {size} images, not {tuple(want.shape)}"
            )
        worst = max(worst, _difference(got, want))
    if not worst <= tolerance:
        raise TraceError(
            f"to: {kind}: logits of the file differ by {worst:.1e} of the largest, more than {tolerance:.0e}; "
            "nothing was written"
        )
    return worst


def _difference(got: Tensor, want: Tensor) -> float:
    """max |got - want| / max |want|; infinite if they are not finite in the same places."""
    seen = want.isfinite()
    if not torch.equal(got[~seen], want[~seen]):
        return torch.inf
    largest = (got[seen] - want[seen]).abs().amax() / want[seen].abs().amax().clamp_min(1e-12)
    return float(largest.nan_to_num(torch.inf))


@contextmanager
def _quiet() -> Iterator[None]:
    """Capture as :func:`isolated` does, silently."""
    with isolated(), _silent():
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the exporters' warnings about their internals; the result is checked anyway."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
