"""Files appear whole or not at all, where they were asked for, with the mode that the old one had."""

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from limits import alone

import netclone
from netclone.errors import ArchiveError
from netclone.runtime import writing
from netclone.runtime.writing import check_place, is_of_files, make_folder, write_file, write_text


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_an_existing_file_keeps_its_mode(tmp_path, mode):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    file.chmod(mode)
    write_file(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.read_bytes() == b"new" and left_in(tmp_path) == ["a"]


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "other").write_bytes(b"")
    write_text(tmp_path / "a", "é")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "a").read_bytes() == "é".encode()


def test_what_is_private_is_never_readable_by_others(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    file.chmod(0o600)
    seen = []
    replaced = os.replace

    def replace(temporary, place):
        seen.append(stat.S_IMODE(os.stat(temporary).st_mode))
        replaced(temporary, place)

    monkeypatch.setattr(os, "replace", replace)
    write_file(file, b"new")
    assert seen == [0o600]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("links", [1, 2])
def test_a_link_stays_one_and_its_file_is_written(tmp_path, exists, links):
    (tmp_path / "there").mkdir()
    file = tmp_path / "there" / "file"
    if exists:
        file.write_bytes(b"old")
    link = file
    for number in range(links):
        (tmp_path / f"link{number}").symlink_to(link)
        link = tmp_path / f"link{number}"
    write_file(link, b"new")
    assert link.is_symlink() and not file.is_symlink() and file.read_bytes() == b"new"
    assert left_in(tmp_path / "there") == ["file"]


def folder(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path)


def device(path):
    path.symlink_to("/dev/null")


def in_a_file(path):
    path.parent.rmdir()
    path.parent.write_bytes(b"")


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (folder, "it is a folder"),
        (os.mkfifo, "it is a pipe"),
        (device, "it is a device"),
        (loop, "a link that leads back to itself"),
        (in_a_file, "there is no folder"),
    ],
)
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path, prepare, why):
    path = tmp_path / "in" / "a"
    path.parent.mkdir()
    prepare(path)
    before = path.parent.lstat().st_mode, left_in(tmp_path), os.path.lexists(path)
    for call in (lambda: check_place(path), lambda: write_file(path, b"new")):
        with pytest.raises(ArchiveError, match=re.escape(f"cannot write '{path}'") + f".*{why}"):
            call()
    assert (path.parent.lstat().st_mode, left_in(tmp_path), os.path.lexists(path)) == before


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "none/a", "x" * 300 + "/a"])
def test_names_that_no_file_has_are_refused(tmp_path, name):
    for call in (lambda: check_place(tmp_path / name), lambda: write_file(tmp_path / name, b"")):
        with pytest.raises(ArchiveError, match="cannot write"):
            call()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch, code):
    file = tmp_path / "a"
    file.write_bytes(b"old")

    def fail(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ArchiveError, match=re.escape(os.strerror(code))):
        write_file(file, b"new")
    assert file.read_bytes() == b"old" and left_in(tmp_path) == ["a"]


def test_what_may_not_be_written_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)
    with pytest.raises(ArchiveError, match="it is read-only"):
        check_place(file)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ArchiveError, match="its folder is read-only"):
        check_place(tmp_path / "b")


def test_a_full_disk_is_a_typed_error(tmp_path):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        write_file(tmp_path / "a", b"x" * 100_000)

    ended = alone(run)
    assert ended.kind == "raised" and ended.text.startswith("ArchiveError: cannot write"), ended
    assert "make room" in ended.text and left_in(tmp_path) == []


def test_temporary_files_of_dead_processes_are_cleared_and_no_others(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom netclone.runtime.writing import write_file\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_file(Path(sys.argv[1]), b'part')\n"
    )
    here = Path(netclone.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=here, check=False)
    assert done.returncode == -signal.SIGKILL
    [dead] = left_in(tmp_path)
    kept = [
        f".netclone-{writing._host()}-{os.getppid()}-{'0' * 16}.tmp",
        dead.replace(writing._host(), "0" * 8),
        ".netclone-mine",
        "other.tmp",
    ]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    write_file(tmp_path / "a", b"whole")
    assert left_in(tmp_path) == sorted([*kept, "a"])


def test_a_folder_is_made_or_a_typed_error(tmp_path):
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path / "file", tmp_path / "file" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(ArchiveError, match="cannot write"):
            make_folder(bad)


def test_errors_of_the_network_are_not_the_disks():
    assert is_of_files(PermissionError(errno.EACCES, "denied")) and is_of_files(OSError(errno.EFBIG, "large"))
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), TimeoutError("slow"), OSError("odd")):
        assert not is_of_files(error)
