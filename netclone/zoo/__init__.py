"""The zoo: which networks netclone takes, as targets and as sources, each checked and one row of a table.

    netclone zoo "resnet*" "torchvision/*" --out zoo

``naming`` says which networks there are, ``building`` gives them weights on which no check is empty, ``checking``
checks one, ``sweeping`` many in ``processes`` of their own, ``tabulating`` writes them up.
"""

from netclone.runtime.processes import Limits, Outcome, each
from netclone.zoo.building import Network, build, randomised, smallest
from netclone.zoo.checking import Row, check
from netclone.zoo.naming import names
from netclone.zoo.sweeping import sweep
from netclone.zoo.tabulating import read, write

__all__ = [
    "Limits",
    "Network",
    "Outcome",
    "Row",
    "build",
    "check",
    "each",
    "names",
    "randomised",
    "read",
    "smallest",
    "sweep",
    "write",
]
