"""The zoo: which networks work as targets and as sources. Each one is checked and becomes a row of a table.

    netclone zoo "resnet*" "torchvision/*" --out zoo

``naming`` lists the networks, ``building`` gives them random weights, ``checking`` checks one, ``sweeping`` checks
many, each in a process of its own, and ``tabulating`` writes the table.
"""

from netclone.runtime.processes import Limits, Outcome, each
from netclone.zoo.building import Network, build, randomised, smallest
from netclone.zoo.checking import Row, check
from netclone.zoo.naming import names
from netclone.zoo.sweeping import sweep
from netclone.zoo.tabulating import report, write

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
    "report",
    "smallest",
    "sweep",
    "write",
]
