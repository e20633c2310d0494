"""code_digest(*modules): a digest of the source of modules of netclone and of all of netclone that they import.

Results that are kept between runs are kept under it: they are made again where the code that makes them has changed,
and not where other code has.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_digest(*modules: str) -> str:
    """SHA-256, as hexadecimal digits, of what the modules and all that they import from netclone read like.

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
                named = [f"{node.module}.{name.name}" for name in node.names]
                todo += [module for module in (node.module or "", *named) if _file(module).is_file()]
    return hashlib.sha256("\n".join(f"{name}\n{found[name]}" for name in sorted(found)).encode()).hexdigest()


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
