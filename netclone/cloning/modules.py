"""CloneModule: some cloned classes as a pure operator graph, its tensors, and a record of how it was made."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.torch_version import TorchVersion

from netclone.arguments import StoredDtype, check_choice, check_finite
from netclone.errors import AdapterError, ArchiveError
from netclone.files import archiving
from netclone.files.spec import CloneSpec
from netclone.learning.routing import Router

Part = Literal["adapter", "source", "classifier"]
"""What a tensor of a clone is of: what was fitted to the target before and behind the source's part, or that part."""

_OFF: ContextVar[frozenset[str]] = ContextVar("netclone_off", default=frozenset())
_OFF_IN_THREAD = threading.local()  # the same for compiled code, in which torch reads no context variable before 2.14
_READS_CONTEXT = TorchVersion(torch.__version__) >= "2.14"


def keys_off() -> frozenset[str]:
    """Keys of the places whose clones are off in this thread or task (see :func:`netclone.disabled`)."""
    if not _READS_CONTEXT and torch.compiler.is_dynamo_compiling():
        in_thread: frozenset[str] = getattr(_OFF_IN_THREAD, "keys", frozenset())
        return in_thread
    return _OFF.get()


@contextmanager
def switched_off(keys: Iterable[str]) -> Iterator[None]:
    """Inside the block, the clones at some more places are off in this thread or task."""
    before = _OFF.get()
    in_thread: frozenset[str] = getattr(_OFF_IN_THREAD, "keys", frozenset())
    _OFF.set(before.union(keys))
    _OFF_IN_THREAD.keys = in_thread.union(keys)
    try:
        yield
    finally:
        _OFF.set(before)
        _OFF_IN_THREAD.keys = in_thread


@dataclass(frozen=True)
class Slot:
    """The place of a clone in a grafted graph; a clone that is swapped in takes it over, and deep copies share its key.

    ``off`` says whether the clone is off for all. While it is off, it leaves ``left`` columns of minus infinity.
    """

    key: str
    off: bool = False
    left: int = 0

    @property
    def is_off(self) -> bool:
        """Whether the clone is off here and now."""
        return self.off or self.key in keys_off()


class CloneModule(nn.Module):
    """Some cloned classes as a module: features of shape ``input_shape`` in, logits ``(N, len(classes))`` out.

    A module from :func:`netclone.extract` takes the source's own (slim) features at ``source_at``. One from
    :func:`netclone.clone` also has an adapter and a classifier: it takes the target's features at ``at`` and, as a
    second argument, the target's own logits or what its last layer reads (``feature_node``). If it has a gate
    (``spec.gate``), further arguments are the target's features that its router reads. Images that the router does not
    send get logits of minus infinity.

    :meth:`push_to_hub`, :meth:`from_pretrained` and :meth:`save_pretrained` work with the Hugging Face Hub as those of
    other libraries do. What they store is the file of :func:`netclone.save`.

    Parameters
    ----------
    body
        Operator graph with one placeholder, or two if ``spec.feature_shape`` is set.
    spec
        The record of the clone: classes, position, certificate, scores, recipe.
    router
        What decides which images the body is run on. None: all of them.

    Reference: Partial Network Cloning (arXiv 2303.10597), section 3: the module ``M_f`` with ``A`` and ``F_c``.
    """

    router: Router | None
    slot: Slot | None = None  # its place in a grafted graph

    def __init__(self, body: fx.GraphModule, spec: CloneSpec, router: Router | None = None) -> None:
        super().__init__()
        self.body = body
        self.spec = spec
        self.router = router

    def forward(self, features: Tensor, target_features: Tensor | None = None, *routed: Tensor) -> Tensor:
        """Logits ``(N, len(classes))`` from features ``(N, *input_shape)`` and, if fitted, ``(N, *feature_shape)``.

        With a gate, ``routed`` are the features that the router reads. A clone of a grafted network that is off gives
        the number of columns that it leaves, for :func:`netclone.graph.joining.join`.
        """
        if self.slot is not None and self.slot.is_off:
            return self.slot.left  # type: ignore[return-value]  # only a grafted graph calls it then
        logits = self._unbiased(features, target_features, *routed)
        return logits + self.spec.bias if self.spec.bias else logits

    def _unbiased(self, features: Tensor, target_features: Tensor | None, *routed: Tensor) -> Tensor:
        if self.spec.feature_shape is None:
            logits: Tensor = self.body(features)
            return logits
        if target_features is None:
            raise AdapterError(
                f"this clone was fitted at '{self.spec.at}', and reads what the target has at "
                f"'{self.spec.feature_node}', too: pass that as second argument, shape "
                f"({', '.join(map(str, ('N', *self.spec.feature_shape)))})"
            )
        if self.router is not None:
            return _routed(self.body, features, target_features, self.router(*routed) > 0, len(self.classes))
        fitted: Tensor = self.body(features, target_features)
        return fitted

    @property
    def classes(self) -> tuple[int, ...]:
        """Indices, in the source's label space, of the cloned classes: the order of the output columns."""
        return self.spec.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per output column; empty if none were given."""
        return self.spec.class_names

    @property
    def source_at(self) -> str | None:
        """Where the source was cut (module path or node name); None: at its input."""
        return self.spec.source_at

    @property
    def at(self) -> str | None:
        """The target position that this clone was fitted for; None if it was only extracted."""
        return self.spec.at

    @property
    def certificate(self) -> float:
        """max |masked - slim| / max |masked| over the example input, computed in float64."""
        return self.spec.certificate

    @property
    def scores(self) -> dict[str, float]:
        """Validation scores by name, as measured when the clone was fitted."""
        return dict(self.spec.scores)

    @property
    def parts(self) -> dict[Part, dict[str, Tensor]]:
        """The tensors of ``body`` by name, in the parts that are there: adapter, source, classifier.

        A clone that was only extracted is all source. One that :func:`netclone.clone` fitted has a classifier, and an
        adapter unless it reads the images.
        """
        found: dict[Part, dict[str, Tensor]] = {}
        for name, tensor in [*self.body.named_parameters(), *self.body.named_buffers()]:
            found.setdefault(self.part_of(name), {})[name] = tensor
        return found

    def part_of(self, tensor: str) -> Part:
        """The part of the clone that a tensor of ``body`` belongs to, by its name.

        In the graph of a fitted clone the source's tensors lie under ``body``, beside ``adapter`` and ``classifier``.
        """
        top = tensor.partition(".")[0]
        fitted = self.spec.feature_shape is not None and top in ("adapter", "classifier")
        return cast(Part, top) if fitted else "source"

    def with_spec(self, **changes: Any) -> CloneModule:
        """The same clone, on the same tensors, with some fields of its spec changed."""
        return CloneModule(self.body, replace(self.spec, **changes), self.router).train(self.training)

    def with_bias(self, bias: float) -> CloneModule:
        """The same clone, on the same tensors, which adds a number to each of its logits.

        A higher bias finds more images of the new classes, and takes more images of old ones for them;
        :func:`netclone.trade_off` shows how many. It is kept in ``spec.bias`` and in the clone's file, and through
        :func:`netclone.refit`. It takes the place of an earlier bias, so ``with_bias(0)`` gives the clone as fitted.

        Raises
        ------
        ArgumentError
            If it is not a finite number.

        Examples
        --------
        >>> import timm, torch, netclone
        >>> source = timm.create_model("test_resnet", num_classes=4)
        >>> module = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[1, 3])
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.equal(module.with_bias(0.5)(images), module(images) + 0.5), module.with_bias(0.5).spec.bias
        (True, 0.5)
        """
        return self.with_spec(bias=check_finite(bias, "bias"))

    def ungated(self) -> CloneModule:
        """The same clone, on the same tensors, without its gate: it sees every image."""
        return CloneModule(self.body, replace(self.spec, gate=None)).train(self.training)

    # The hub's methods have the names and keywords of huggingface_hub.ModelHubMixin, and work on the clone's file.
    # huggingface_hub is imported only when they are called.

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: dict[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write a folder: ``clone.safetensors``, as :func:`netclone.save` writes it, and a model card, ``README.md``.

        Parameters
        ----------
        save_directory
            The folder, created if it does not exist. A card that is already there stays.
        config
            Written as ``config.json`` for other tools; netclone never reads it.
        repo_id, push_to_hub, push_to_hub_kwargs
            Whether to push it too, and the arguments of :meth:`push_to_hub`. Without a name, the repository is called
            as the folder is.
        model_card_kwargs
            Further metadata for the card: ``{"license": "mit", "base_model": "user/network"}``.

        Returns
        -------
        The address of the commit if it was pushed, else None.

        Raises
        ------
        ArchiveError
            As for :func:`netclone.save`.
        HubError
            As for :meth:`push_to_hub`.

        Examples
        --------
        >>> import os, tempfile, timm, netclone
        >>> source = timm.create_model("test_resnet", num_classes=4)
        >>> module = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[1, 3])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     module.save_pretrained(folder)
        ...     sorted(os.listdir(folder)), netclone.CloneModule.from_pretrained(folder).classes
        (['README.md', 'clone.safetensors'], (1, 3))
        """
        from netclone.files.publishing import save_pretrained

        with _saved(self) as file:
            return save_pretrained(
                file,
                save_directory,
                config=config,
                repo_id=repo_id,
                push_to_hub=push_to_hub,
                model_card_kwargs=model_card_kwargs,
                **push_to_hub_kwargs,
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> CloneModule:
        """Read a clone from a folder or the hub (``"user/name"``), as data: in eval mode, on the CPU.

        Parameters
        ----------
        pretrained_model_name_or_path
            A folder that :meth:`save_pretrained` wrote, or a repository that :meth:`push_to_hub` filled.
        force_download
            Whether to download again what the cache holds.
        token
            None: the one you are logged in with, if any.
        cache_dir
            Folder for downloads. None: huggingface_hub's own.
        local_files_only
            Whether to look in the cache alone, without the network.
        revision
            Branch, tag or commit. None: the newest on main.

        Raises
        ------
        HubError
            If there is no such repository or revision, it holds no clone, it may not be read, or the hub cannot be
            reached.
        ArchiveError
            As for :func:`netclone.load`.
        """
        from netclone.files.publishing import content_of

        content, what = content_of(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return from_bytes(content, what)

    def push_to_hub(  # noqa: PLR0913 - public
        self,
        repo_id: str,
        *,
        config: dict[str, Any] | None = None,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Upload the files of :meth:`save_pretrained` to a repository on the hub, created if necessary.

        Parameters
        ----------
        repo_id
            ``"user/name"``, or ``"name"`` alone for one of your own.
        private
            Whether a new repository is private. None: as your account's settings say.
        token
            None: the one you are logged in with.
        branch, create_pr
            Branch to upload to, and whether to open a pull request instead.
        allow_patterns, ignore_patterns, delete_patterns
            Which files to send, and which to delete. ``ignore_patterns="README.md"`` keeps a card that you wrote.
        config, model_card_kwargs
            As for :meth:`save_pretrained`.

        Returns
        -------
        The address of the commit.

        Raises
        ------
        ArchiveError
            As for :func:`netclone.save`.
        HubError
            If you are not logged in, may not write to the repository, or the hub cannot be reached.
        """
        from netclone.files.publishing import push_to_hub

        with _saved(self) as file:
            return push_to_hub(
                file,
                repo_id,
                config=config,
                commit_message=commit_message,
                private=private,
                token=token,
                branch=branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
                model_card_kwargs=model_card_kwargs,
            )

    def extra_repr(self) -> str:
        return f"classes={self.classes}, source_at={self.source_at!r}, at={self.at!r}"


def save(module: CloneModule, path: str | os.PathLike[str], dtype: str | None = None) -> None:
    """Write a clone to one ``.safetensors`` file, completely or not at all.

    Its content passes the checks of :func:`load` before anything is written. The file replaces ``path`` in one step. It
    holds the tensors that the graph reads; tensors that share memory are written one by one.

    Parameters
    ----------
    module
        The clone. Operators that :mod:`netclone.graph.purity` does not allow are refused, by node name.
    path
        Where to write. The folder has to exist.
    dtype
        ``"bf16"`` or ``"int8"``: store the weights in half or a quarter of the bytes of float32. Biases and statistics
        stay as they are. :func:`load` gives the weights in their own dtype again, rounded. How much that changes the
        logits is measured and written into the file: ``load(path).spec.stored``.

    Raises
    ------
    ArgumentError
        If ``dtype`` is neither.
    ArchiveError
        If the clone holds what an archive may not contain, or the file cannot be written.

    Examples
    --------
    >>> import os, tempfile, timm, netclone
    >>> source = timm.create_model("test_resnet", num_classes=4)
    >>> module = netclone.extract(source, netclone.localize(source, method="magnitude"), classes=[1, 3])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     netclone.save(module, f"{folder}/whole.safetensors")
    ...     netclone.save(module, f"{folder}/small.safetensors", dtype="int8")
    ...     (name, error), = netclone.load(f"{folder}/small.safetensors").spec.stored
    ...     os.path.getsize(f"{folder}/small.safetensors") < os.path.getsize(f"{folder}/whole.safetensors"), error < 0.1
    (True, True)
    """
    if dtype is not None:
        check_choice(dtype, StoredDtype, "dtype")
    archiving.path_of(path)
    _check(module)
    archiving.write_archive(module.body, module.spec, path, dtype, _numbers(module))


def load(path: str | os.PathLike[str]) -> CloneModule:
    """Read a clone that :func:`save` wrote; safe for files from strangers.

    Returns
    -------
    The clone, on the CPU and in eval mode, with the same generated code, the same tensors to the bit, and an equal
    ``spec``.

    Raises
    ------
    ArchiveError
        If the file is missing, damaged, written by a newer netclone, or asks for anything an archive may not contain.
    """
    return _module(*archiving.read_archive(path))


def to_bytes(module: CloneModule, what: str) -> bytes:
    """The content of the file that :func:`save` would write; ``what`` names the clone in messages.

    Raises
    ------
    ArchiveError
        If the clone holds what an archive may not contain.
    """
    _check(module)
    return archiving.to_bytes(module.body, module.spec, what, _numbers(module))


def from_bytes(content: bytes, what: str) -> CloneModule:
    """The clone that :func:`load` would read from a file of this content; ``what`` names it in messages.

    Raises
    ------
    ArchiveError
        As :func:`load`.
    """
    return _module(*archiving.from_bytes(content, what))


def _routed(body: nn.Module, features: Tensor, target_features: Tensor, sent: Tensor, classes: int) -> Tensor:
    """What ``body`` gives for the images that are sent ``(N,)``, and minus infinity for the others.

    A graph for all inputs (``torch.compile``, ``torch.export``) holds both ways for the whole batch: the body is run on
    all images of a batch if one of them is sent.
    """
    if torch.compiler.is_compiling():

        def whole(features: Tensor, target_features: Tensor, sent: Tensor) -> Tensor:
            return torch.where(sent.unsqueeze(1), body(features, target_features), -torch.inf)

        def nothing(features: Tensor, target_features: Tensor, sent: Tensor) -> Tensor:
            return target_features.new_full((len(target_features), classes), -torch.inf)

        either: Tensor = torch.cond(sent.any(), whole, nothing, (features, target_features, sent))
        return either
    chosen = sent.nonzero().flatten()
    if len(chosen) == len(sent):
        every: Tensor = body(features, target_features)
        return every
    if len(chosen) == 0:  # not all operators take an empty batch
        return target_features.new_full((len(sent), classes), -torch.inf)
    some: Tensor = body(features[chosen], target_features[chosen])
    return some.new_full((len(sent), classes), -torch.inf).index_put((chosen,), some)


def _numbers(module: CloneModule) -> archiving.Router | None:
    """A router's numbers, as a file holds them."""
    return None if module.router is None else (module.router.weight, module.router.bias)


def _module(body: fx.GraphModule, spec: CloneSpec, numbers: archiving.Router | None) -> CloneModule:
    """The clone that a file holds."""
    if spec.gate is None or numbers is None:
        return CloneModule(body, spec).eval()
    try:
        router = Router([shape for _, shape in spec.gate.reads], *numbers)
    except AdapterError as error:
        raise ArchiveError(f"gate: {error}") from error
    return CloneModule(body, spec, router).eval()


def _check(module: object) -> None:
    if not isinstance(module, CloneModule) or not isinstance(module.body, fx.GraphModule):
        raise ArchiveError(
            f"only a CloneModule can be saved, got {type(module).__name__}; make one with netclone.clone(...)"
        )


@contextmanager
def _saved(module: CloneModule) -> Iterator[Path]:
    """A clone's file, which is deleted at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clone.safetensors"
        save(module, file)
        yield file
