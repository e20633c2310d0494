"""The benchmark: netclone.clone against every baseline, over suites of data and networks, seeds and clone sets.

    python -m netclone bench digits --seeds 1 --out bench-digits

``suites`` has data, networks and classes, ``networks`` the architectures that no library supplies, ``training`` trains
networks and keeps them, ``planning`` lists the runs, ``running`` carries them out, ``reporting`` writes the results.
"""

from netclone.benchmarking.pretrained import with_weights
from netclone.benchmarking.reporting import report
from netclone.benchmarking.running import run
from netclone.benchmarking.suites import SUITES, Suite, in_development, suite_named

__all__ = ["SUITES", "Suite", "in_development", "report", "run", "suite_named", "with_weights"]
