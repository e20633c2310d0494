from .archiving import load, save
from .channels import ChannelGroup, ChannelGroups, Unprunable, channel_groups
from .cloning import clone
from .errors import (
    AdapterError,
    ArchiveError,
    ArgumentError,
    BitsError,
    CertificateError,
    CloneNameError,
    DataError,
    FitError,
    HubError,
    LoadError,
    LostInTrainingWarning,
    MaskError,
    NetcloneError,
    NetcloneWarning,
    OutputError,
    PositionError,
    SameNameWarning,
    TargetError,
    TargetWarning,
    TraceError,
    UncalibratedWarning,
    WeakDataWarning,
    WorkerError,
)
from .evaluating import Cost, Scores, cost, evaluate
from .extracting import extract
from .grafting import save_grafted
from .injecting import clones, inject, remove
from .loading import load_model
from .localizing import localize
from .masks import ChannelMask
from .modules import Candidate, CloneModule, CloneSpec
from .tracing import position, trace
from .verifying import Difference, Verification, verify

__version__: str

__all__ = [
    "AdapterError",
    "ArchiveError",
    "ArgumentError",
    "BitsError",
    "Candidate",
    "CertificateError",
    "ChannelGroup",
    "ChannelGroups",
    "ChannelMask",
    "CloneModule",
    "CloneNameError",
    "CloneSpec",
    "Cost",
    "DataError",
    "Difference",
    "FitError",
    "HubError",
    "LoadError",
    "LostInTrainingWarning",
    "MaskError",
    "NetcloneError",
    "NetcloneWarning",
    "OutputError",
    "PositionError",
    "SameNameWarning",
    "Scores",
    "TargetError",
    "TargetWarning",
    "TraceError",
    "UncalibratedWarning",
    "Unprunable",
    "Verification",
    "WeakDataWarning",
    "WorkerError",
    "channel_groups",
    "clone",
    "clones",
    "cost",
    "evaluate",
    "extract",
    "inject",
    "load",
    "load_model",
    "localize",
    "position",
    "remove",
    "save",
    "save_grafted",
    "trace",
    "verify",
]
