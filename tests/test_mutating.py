"""Files with mutations are refused or the same, or signed anew by whoever made them."""

import pytest
from fuzz import fuzz_files, write
from limits import each
from mutating import KEYS, Mutation, original, run

import netclone.files.bundling
from netclone.files import archiving
from netclone.runtime import resuming


@pytest.mark.parametrize("kind", range(len(KEYS)))
def test_a_whole_file_is_taken(kind, monkeypatch):
    monkeypatch.setattr(Mutation, "_cut", lambda self, content: content)
    seed = next(seed for seed in range(kind, 900, len(KEYS)) if is_whole(seed))
    assert run(seed) == "the same"


def is_whole(seed):
    mutation = Mutation(seed)
    return mutation.content == original(mutation.kind)


def test_some_files_with_mutations_do_not_misbehave():
    figures = fuzz_files(150)
    assert figures["misbehaved"] == []
    assert all({"refused", "the same"} <= set(found) for found in figures["ends"].values())


@pytest.mark.parametrize("module", [archiving, netclone.files.bundling, resuming], ids=list(KEYS))
def test_a_reader_that_compares_no_digest_is_found(module, monkeypatch):
    """What it says of a file whose bits were flipped is another word, and not that all is well."""

    class Any(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

    name = "_digest" if module is archiving else "content_digest"
    for kind in KEYS:
        original(kind)
    monkeypatch.setattr(module, name, lambda *_: Any("0" * 64))
    kind = [archiving, netclone.files.bundling, resuming].index(module)
    seeds = [seed for seed in range(kind, 600, len(KEYS)) if Mutation(seed).how == "bits"]
    assert any((ended.value or "").startswith("another, NOT signed") for ended in each(run, seeds))


def test_mutations_are_the_same_every_time():
    assert Mutation(7).content == Mutation(7).content != Mutation(10).content


@pytest.mark.fuzz
def test_many_files_with_mutations_do_not_misbehave():
    figures = fuzz_files(10_000)
    write("files", figures)
    assert figures["misbehaved"] == []
