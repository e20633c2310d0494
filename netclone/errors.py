"""The exceptions and warnings of netclone: one root each, and a few types below it.

Every message says what failed, at which node or argument, what was seen, what was expected, and what to do.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank; empty if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


class NetcloneError(Exception):
    """Root of everything netclone raises on purpose."""


class ArgumentError(NetcloneError, ValueError):
    """An argument is outside what is accepted (``keep``, ``classes``, ``method``, a device or dtype)."""


class LoadError(NetcloneError, LookupError):
    """There is no such model, or a checkpoint is missing, holds more than tensors, or is another network's."""


class TraceError(NetcloneError, ValueError):
    """Neither capture could turn the model into a graph, or the graph does not compute what the model computes."""


class PositionError(NetcloneError, LookupError):
    """``at`` is not a position of the model, or the model cannot be cut or tapped there."""


class AdapterError(NetcloneError, ValueError):
    """A clone's input does not fit the features at the position that it is grafted to."""


class TargetError(NetcloneError, ValueError):
    """A clone was fitted to another target: one with other weights, or with other image preprocessing."""


class OutputError(NetcloneError, TypeError):
    """The model does not return one ``(N, classes)`` tensor of logits."""


class MaskError(NetcloneError, ValueError):
    """A mask does not belong to the model it is applied to, or would leave nothing."""


class DataError(NetcloneError, ValueError):
    """The data are empty, not finite, of the wrong shape, or labelled outside the range."""


class FitError(NetcloneError, ArithmeticError):
    """Training diverged: the loss is not finite."""


class CloneNameError(NetcloneError, LookupError):
    """A clone's name is taken, is unknown, or is not an identifier."""


class CertificateError(NetcloneError, ArithmeticError):
    """The slim network does not equal the masked one: a bug in netclone, never to be ignored."""


class BitsError(NetcloneError, ArithmeticError):
    """The old logits of a grafted network differ from the target's in some bit."""


class ArchiveError(NetcloneError, ValueError):
    """A file cannot be written, is not an intact netclone file, or contains what such a file may not."""


class HubError(NetcloneError, OSError):
    """The hub has no such repository, revision or clone, denies access to it, or cannot be reached."""


class WorkerError(NetcloneError, RuntimeError):
    """Another process of a distributed run is gone, cannot be reached, or was given different data."""


class NetcloneWarning(UserWarning):
    """Root of netclone's warnings: a result is weaker than it looks."""


class TargetWarning(NetcloneWarning):
    """A clone is grafted onto another target than the one it was fitted to."""


class UncalibratedWarning(NetcloneWarning):
    """New-class logits were fitted without any sample of the target's own classes."""


class LostInTrainingWarning(NetcloneWarning):
    """The model does more in train mode than its traced graph does."""


class WeakDataWarning(NetcloneWarning):
    """The clone set is usable but weak: too few or too uniform images, or labels that the source contradicts."""


class SameNameWarning(NetcloneWarning):
    """Two columns of a grafted network have the same class name."""
