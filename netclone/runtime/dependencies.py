"""code_digest(*modules): a digest of the source of some netclone modules and the netclone modules that they import.

It is part of the key of results that are kept between runs. So a result is computed again if its own code has changed,
and not if other code has.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_digest(*modules: str, within: tuple[str, ...] = ("netclone",)) -> str:
    """SHA-256, as hexadecimal digits, of the source of the modules and of all they import from the packages ``within``.

    Examples
    --------
    >>> code_digest("netclone.learning.stepping") == code_digest("netclone.learning.stepping", "netclone.errors")
    True
    """
    todo, found = list(modules), dict[str, str]()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = text = _file(name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "netclone":
                named = [node.module or "", *(f"{node.module}.{name.name}" for name in node.names)]
                inside = [module for module in named if any(f"{module}.".startswith(f"{one}.") for one in within)]
                todo += [module for module in inside if _file(module).is_file()]
    return hashlib.sha256("\n".join(f"{name}\n{found[name]}" for name in sorted(found)).encode()).hexdigest()


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
