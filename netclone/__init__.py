"""netclone: clone a capability out of one network and graft it onto another, removable without a trace.

    module  = netclone.clone(source, target, data, classes=[5, 7], target_data=old)
    grafted = netclone.inject(target, module, name="shirts")     # a new GraphModule; the original untouched
    target2 = netclone.remove(grafted, "shirts")                 # bit-identical to before

An implementation of Partial Network Cloning (CVPR 2023, arXiv 2303.10597).
"""

from netclone.archiving import load, save
from netclone.channels import ChannelGroup, ChannelGroups, Unprunable, channel_groups
from netclone.cloning import clone
from netclone.errors import (
    AdapterError,
    ArchiveError,
    ArgumentError,
    CertificateError,
    CloneNameError,
    DataError,
    FitError,
    LoadError,
    MaskError,
    NetcloneError,
    NetcloneWarning,
    OutputError,
    PositionError,
    TraceError,
    UncalibratedWarning,
    WeakDataWarning,
)
from netclone.evaluating import Cost, Scores, cost, evaluate
from netclone.extracting import extract
from netclone.injecting import clones, inject, remove
from netclone.loading import load_model
from netclone.localizing import localize
from netclone.masks import ChannelMask
from netclone.modules import Candidate, CloneModule, CloneSpec
from netclone.tracing import position, trace

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "ArchiveError",
    "ArgumentError",
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
    "FitError",
    "LoadError",
    "MaskError",
    "NetcloneError",
    "NetcloneWarning",
    "OutputError",
    "PositionError",
    "Scores",
    "TraceError",
    "UncalibratedWarning",
    "Unprunable",
    "WeakDataWarning",
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
    "trace",
]
