"""code_digest: results are made again where the code that makes them has changed, and only there."""

import pytest

from netclone.runtime import dependencies
from netclone.runtime.dependencies import code_digest

FILES = {
    "top.py": "from netclone.middle import one\n",
    "middle.py": "def one():\n    from netclone.part.low import two\n    return two\n",
    "part/__init__.py": "",
    "part/low.py": "from netclone import beside, clone\n",
    "beside.py": "three = 3\n",
    "aside.py": "from netclone.top import one\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(dependencies, "PACKAGE", tmp_path)
    code_digest.cache_clear()
    yield tmp_path
    code_digest.cache_clear()


@pytest.mark.parametrize(
    ("changed", "matters"),
    [("top.py", True), ("middle.py", True), ("part/low.py", True), ("beside.py", True), ("aside.py", False)],
)
def test_what_is_imported_matters_even_from_within_a_function_and_nothing_else(package, changed, matters):
    before = code_digest("netclone.top")
    code_digest.cache_clear()
    with (package / changed).open("a") as file:
        file.write("# another line\n")
    assert (code_digest("netclone.top") != before) == matters


def test_only_what_lies_within_is_followed(package):
    before = code_digest("netclone.part.low", "netclone.top", within=("netclone.part",))
    for changed, matters in (("middle.py", False), ("beside.py", False), ("part/low.py", True)):
        code_digest.cache_clear()
        with (package / changed).open("a") as file:
            file.write("# another line\n")
        assert (code_digest("netclone.part.low", "netclone.top", within=("netclone.part",)) != before) == matters


def test_order_and_repetition_do_not_matter(package):
    assert code_digest("netclone.top") == code_digest("netclone.middle", "netclone.top", "netclone.part.low")
    assert code_digest("netclone.middle") != code_digest("netclone.top")


def test_a_package_is_its_init(package):
    assert code_digest("netclone.part") != code_digest("netclone.part.low")
