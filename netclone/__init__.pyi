from .channels.grouping import ChannelGroup, ChannelGroups, Explanation, Unprunable, channel_groups
from .channels.masks import ChannelMask
from .cloning.composing import compose
from .cloning.extracting import extract
from .cloning.grafted import GraftedModule, clones
from .cloning.injecting import inject, remove
from .cloning.method import clone
from .cloning.modules import CloneModule, load, save
from .cloning.recipe import Recipe
from .cloning.refitting import Latents, latents, refit
from .cloning.switching import disable, disabled, enable, replace
from .cloning.verifying import Difference, Verification, verify
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
from .files.spec import Candidate, CloneSpec
from .graph.tracing import position, trace
from .learning.localizing import localize
from .metrics.evaluating import Cost, Scores, cost, evaluate
from .metrics.trading import Trade, TradeOff, trade_off
from .models.grafting import save_grafted
from .models.loading import load_model
from .runtime.context import Run

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
    "Explanation",
    "FitError",
    "GraftedModule",
    "HubError",
    "Latents",
    "LoadError",
    "LostInTrainingWarning",
    "MaskError",
    "NetcloneError",
    "NetcloneWarning",
    "OutputError",
    "PositionError",
    "Recipe",
    "Run",
    "SameNameWarning",
    "Scores",
    "TargetError",
    "TargetWarning",
    "TraceError",
    "Trade",
    "TradeOff",
    "UncalibratedWarning",
    "Unprunable",
    "Verification",
    "WeakDataWarning",
    "WorkerError",
    "channel_groups",
    "clone",
    "clones",
    "compose",
    "cost",
    "disable",
    "disabled",
    "enable",
    "evaluate",
    "extract",
    "inject",
    "latents",
    "load",
    "load_model",
    "localize",
    "position",
    "refit",
    "remove",
    "replace",
    "save",
    "save_grafted",
    "trace",
    "trade_off",
    "verify",
]
