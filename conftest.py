"""Examples in the docstrings of decorated functions are run, too."""

import doctest
import inspect

_from_module = doctest.DocTestFinder._from_module


def _decorated_from_module(self, module, object):
    return _from_module(self, module, inspect.unwrap(object) if inspect.isfunction(object) else object)


doctest.DocTestFinder._from_module = _decorated_from_module
