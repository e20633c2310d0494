"""Examples in the docstrings of decorated functions are run, too, and no test waits for the garbage of others."""

import doctest
import gc
import inspect

import pytest

_from_module = doctest.DocTestFinder._from_module


def _decorated_from_module(self, module, object):
    return _from_module(self, module, inspect.unwrap(object) if inspect.isfunction(object) else object)


doctest.DocTestFinder._from_module = _decorated_from_module

_files = [None]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the first test of a file, let Python's collector of cycles pass over all that is there already.

    A process that has collected thousands of tests and imported every library holds a million objects or two. To look
    through them takes a second, and networks and graphs, which are cycles, make the collector do so again and again.
    """
    if item.path != _files[0]:
        _files[0] = item.path
        gc.collect()
        gc.freeze()
