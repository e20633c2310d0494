"""Modules by their old names, from before the rooms: they still import, with a DeprecationWarning, until 0.2."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "adapting": "learning.adapting",
    "archiving": "files.archiving",
    "bars": "runtime.bars",
    "budgeting": "channels.budgeting",
    "bundling": "files.bundling",
    "capturing": "graph.capturing",
    "comparing": "metrics.comparing",
    "counting": "graph.counting",
    "data": "learning.data",
    "dependencies": "runtime.dependencies",
    "deploying": "workflows.deploying",
    "describing": "graph.describing",
    "distilling": "learning.distilling",
    "drawing": "reporting.layout",
    "evaluating": "metrics.evaluating",
    "examining": "workflows.examining",
    "exporting": "graph.exporting",
    "extracting": "cloning.extracting",
    "files.digests": "runtime.digests",
    "files.text": "runtime.text",
    "folding": "graph.folding",
    "functionalizing": "graph.functionalizing",
    "gates": "channels.gates",
    "grafting": "models.grafting",
    "graphdata": "files.graphdata",
    "injecting": "cloning.injecting",
    "inspecting": "files.inspecting",
    "journal": "runtime.journal",
    "labelling": "channels.labelling",
    "labels": "channels.labels",
    "loading": "models.loading",
    "localizing": "learning.localizing",
    "masks": "channels.masks",
    "measuring": "graph.measuring",
    "models.numbers": "graph.numbers",
    "modules": "cloning.modules",
    "neighbourhoods": "learning.neighbourhoods",
    "normalising": "channels.normalising",
    "oprules": "channels.oprules",
    "picturing": "reporting.thumbnails",
    "placing": "cloning.placing",
    "plotting": "reporting.png",
    "preparing": "graph.preparing",
    "publishing": "files.publishing",
    "reading": "models.reading",
    "reconstructing": "learning.reconstructing",
    "rendering": "reporting.rendering",
    "reporting.drawing": "reporting.layout",
    "reporting.picturing": "reporting.thumbnails",
    "reporting.plotting": "reporting.png",
    "resuming": "runtime.resuming",
    "sharing": "runtime.sharing",
    "slimming": "channels.slimming",
    "stepping": "learning.stepping",
    "tracing": "graph.tracing",
    "translating": "workflows.translating",
    "verifying": "cloning.verifying",
    "writing": "runtime.writing",
    "zoo.processes": "runtime.processes",
}
"""Old names behind ``netclone.``, and the new ones."""


class Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name; the two names give the same module."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for an old name; None for all others."""
        package, _, name = fullname.partition(".")
        return importlib.machinery.ModuleSpec(fullname, self) if package == "netclone" and name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module under its new name."""
        new = f"netclone.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}; the old name works until 0.2", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._specs[new] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do not run the module again; only restore its own spec, which importing has replaced."""
        module.__spec__ = self._specs.pop(module.__name__)


def keep_old_names() -> None:
    """Make the old names of modules importable."""
    if not any(type(finder).__qualname__ == Moved.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(Moved())
