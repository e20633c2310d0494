"""The benchmark: netclone.clone against every baseline, over suites of data and networks, seeds and clone sets.

    python -m netclone bench digits --seeds 1 --out bench-digits

``suites`` says what is run on, ``networks`` what no library supplies, ``training`` trains and keeps these, ``planning``
lists the runs, ``running`` makes them, ``reporting`` writes them up.
"""

from netclone.benchmarking.reporting import report
from netclone.benchmarking.running import run
from netclone.benchmarking.suites import SUITES, Suite, in_development, suite_named

__all__ = ["SUITES", "Suite", "in_development", "report", "run", "suite_named"]
