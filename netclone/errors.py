"""The exceptions and warnings of netclone: one root each, few typed children.

Every message says what failed, at which node or argument, what was seen and what was expected, and the way out.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text that holds anything; empty where there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


class NetcloneError(Exception):
    """Root of everything netclone raises on purpose."""


class ArgumentError(NetcloneError, ValueError):
    """An argument is outside what is accepted (``keep``, ``classes``, ``method``, a device or dtype)."""


class LoadError(NetcloneError, LookupError):
    """A name gives no network, or a checkpoint is missing, not one of tensors alone, or of another network."""


class TraceError(NetcloneError, ValueError):
    """Neither capture could turn the model into a graph, or the graph does not compute what the model computes."""


class PositionError(NetcloneError, LookupError):
    """``at`` names no position of the model, or one that cannot be cut or tapped."""


class AdapterError(NetcloneError, ValueError):
    """A clone's input does not fit the features at the position it is put on."""


class TargetError(NetcloneError, ValueError):
    """A clone was fitted to another target: to other numbers, or to images that are prepared in another way."""


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
    """The slim network does not equal the masked one: a fault of netclone, never to be ignored."""


class BitsError(NetcloneError, ArithmeticError):
    """Old logits of a grafted network are not the target's to the bit."""


class ArchiveError(NetcloneError, ValueError):
    """A file cannot be written, is no intact netclone archive, or asks for what an archive may not contain."""


class HubError(NetcloneError, OSError):
    """A hub has no such repository, revision or clone, does not let it be read or written, or cannot be reached."""


class WorkerError(NetcloneError, RuntimeError):
    """A process of a run that several share is gone, cannot be reached, or holds something else than the others."""


class NetcloneWarning(UserWarning):
    """Root of netclone's warnings: a result is weaker than it looks."""


class TargetWarning(NetcloneWarning):
    """A clone is put onto another target than it was fitted to."""


class UncalibratedWarning(NetcloneWarning):
    """New-class logits were fitted without any sample of the target's own classes."""


class LostInTrainingWarning(NetcloneWarning):
    """A traced model does in train mode what it does in eval mode, where the model itself does more."""


class WeakDataWarning(NetcloneWarning):
    """The clone set is accepted, but too little can be learned from it, or something else than its labels say."""


class SameNameWarning(NetcloneWarning):
    """Two columns of a grafted network have the name of one class."""
