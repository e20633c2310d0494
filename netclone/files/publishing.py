"""Clones on the Hugging Face Hub, through its own mixin: a folder with the clone's file and a model card.

A clone from the hub may come from anyone, so it is read as :func:`netclone.load` reads a file. Only this module imports
``huggingface_hub``.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from netclone.errors import ArchiveError, HubError, NetcloneError
from netclone.files.archiving import from_bytes, read_archive
from netclone.files.inspecting import Inspection, facts, inspect
from netclone.files.spec import CloneSpec
from netclone.runtime.writing import check_place, is_of_files, make_folder, reason, write_file

FILE = "clone.safetensors"
"""Name of the archive in a folder or repository."""

_README = "README.md"
_LOGIN = "log in with 'hf auth login', set HF_TOKEN, or pass a token"
_LONG = 200  # characters of a cell in a card
_ROWS = 100  # of a table in a card

_CARD = """\
---
{{ card_data }}
---

# A clone of {{ title }}

A capability cloned out of one network by netclone, to be grafted onto another as a side branch and removed again
without a trace. The target's own logits stay what they are, to the bit.

| | |
|---|---|
{% for name, fact in facts %}| {{ name }} | {{ fact }} |
{% endfor %}
## Scores
{% if scores %}
Measured when the clone was fitted, on samples held out for validation.

| score | value |
|---|---|
{% for name, value in scores %}| {{ name }} | {{ value }} |
{% endfor %}{% else %}
None: the clone was extracted and not fitted to a target.
{% endif %}{% if search %}
## Positions tried

| position | source cut behind | score | rejected because |
|---|---|---|---|
{% for row in search %}| {{ row | join(" | ") }} |
{% endfor %}{% endif %}
## Use it

```python
import netclone
clone = netclone.CloneModule.from_pretrained("{{ repo }}")  # read as data: no pickle, no code
grafted = netclone.inject(target, clone{{ at }})  # the target's logits, then the clone's
```

```bash
netclone pull {{ repo }} --out clone.safetensors
netclone inspect clone.safetensors
netclone inject TARGET clone.safetensors --out grafted.safetensors
```

## Cite

[Partial Network Cloning](https://arxiv.org/abs/2303.10597), CVPR 2023.

```bibtex
@inproceedings{ye2023partial,
  title     = {Partial Network Cloning},
  author    = {Ye, Jingwen and Liu, Songhua and Wang, Xinchao},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2023}
}
```
"""


class _Published(
    ModelHubMixin,
    library_name="netclone",
    tags=["netclone", "partial-network-cloning"],
    pipeline_tag="image-classification",
    model_card_template=_CARD,
):
    """A clone's file as the mixin takes it: saved is a copy of the file, to the byte, and a card of its header."""

    def __init__(self, file: Path, repo: str | None = None) -> None:
        self.file = file
        self.repo = repo
        self._hub_mixin_config = None  # no config.json: the archive's header says it all

    def _save_pretrained(self, save_directory: Path) -> None:
        write_file(save_directory / FILE, self.file.read_bytes())

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # without the keywords of other models
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
    ) -> _Published:
        file = hf_hub_download(
            model_id,
            FILE,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls(Path(file), model_id)

    def generate_model_card(self, **metadata: Any) -> ModelCard:
        """The card; ``metadata`` goes to its first lines: ``license="mit"``, ``base_model="user/network"``."""
        info = self._hub_mixin_info
        data = ModelCardData(**{**info.model_card_data.to_dict(), **metadata})
        card: ModelCard = ModelCard.from_template(data, template_str=info.model_card_template, **self._values())
        return card

    def _values(self) -> dict[str, Any]:
        """What the card says, with whatever comes from the file made text that Markdown takes for nothing else."""
        inspection = inspect(self.file)
        spec = inspection.spec
        names = ", ".join(spec.class_names) or ", ".join(f"class {index}" for index in spec.classes)
        return {
            "title": _text(names),
            "facts": [(name, _text(fact)) for name, fact in _facts(inspection).items() if fact],
            "scores": _first([(_text(name), f"{value:.4g}") for name, value in spec.scores]),
            "search": _first(
                [
                    (
                        _text(tried.at),
                        _text(tried.source_at or "input"),
                        "" if tried.score is None else f"{tried.score:.1%}",
                        _text(tried.reason),
                    )
                    for tried in spec.search
                ]
            ),
            "repo": self.repo or "USER/REPO",
            "at": "" if spec.at is not None else ', at="POSITION"',
        }


def _facts(inspection: Inspection) -> dict[str, str]:
    """What ``netclone inspect`` shows, with whole fingerprints; the scores have a table of their own."""
    known = facts(inspection)
    for short in ("scores", "structures", "digest"):
        del known[short]
    spec = inspection.spec
    whole = {"source's structure": spec.source_fingerprint, "target's structure": spec.target_fingerprint}
    whole["digest"] = inspection.sha256
    return {**known, **{f"{name} (SHA-256)": digest for name, digest in whole.items()}}


def _text(value: str) -> str:
    """Text that shows as itself in one line of Markdown, be it in a table: no markup, no HTML, no hidden characters."""
    plain = " ".join("".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in value).split())
    if len(plain) > _LONG:
        plain = f"{plain[: _LONG - 3]}..."
    return re.sub(r"([\\`*_{}\[\]<>#!|~$&:@^])", r"\\\1", plain)


def _first(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    more = len(rows) - _ROWS
    return rows if more <= 0 else [*rows[:_ROWS], (f"and {more} more", *[""] * (len(rows[0]) - 1))]


# What the methods of CloneModule do with its file


def save_pretrained(
    file: Path, save_directory: str | os.PathLike[str], *, repo_id: str | None = None, **options: Any
) -> str | None:
    """Write a clone's file into a folder, as ``clone.safetensors``, and a card, ``README.md``.

    A card that is there already stays. ``options`` as for ``ModelHubMixin.save_pretrained``.

    Returns
    -------
    The address of the commit with ``push_to_hub=True``, else None.

    Raises
    ------
    ArchiveError
        If the clone holds what an archive may not contain, or the folder cannot be written.
    HubError
        If it was to be pushed and could not be.
    """
    folder = Path(save_directory)
    wanted = options.pop("push_to_hub", False)
    here: dict[str, Any] = {name: options.get(name) for name in ("config", "model_card_kwargs")}
    with _told(repo_id or folder.name):
        published = _Published(file, repo_id)
        with tempfile.TemporaryDirectory() as made:  # the mixin writes in place; what a user has is written as a whole
            published.save_pretrained(made, repo_id=repo_id, **here)
            make_folder(folder)
            for new in sorted(Path(made).iterdir()):
                if new.name != _README or not (folder / _README).exists():
                    write_file(folder / new.name, new.read_bytes())
        if here["config"] is None:
            (folder / "config.json").unlink(missing_ok=True)  # of another clone
        return str(published.push_to_hub(repo_id or folder.name, **options)) if wanted else None


def content_of(
    name: str | os.PathLike[str],
    *,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
) -> tuple[bytes, str]:
    """The content of a clone's file in a folder or a repository of the hub, and what to call it in messages.

    Raises
    ------
    HubError
        If there is no such repository, revision or clone in it, it may not be read, or the hub cannot be reached.
    ArchiveError
        If a folder has none, or it cannot be read.
    """
    path = Path(name)
    if os.path.isdir(path):
        if not (path / FILE).is_file():
            raise ArchiveError(f"folder '{path}' holds no {FILE}; write one with module.save_pretrained(folder)")
        with _told(str(path)):
            return (path / FILE).read_bytes(), f"'{path / FILE}'"
    if os.path.isfile(path):
        raise ArchiveError(f"'{path}' is a file, expected a folder or a repository; read files with netclone.load(...)")
    repo = str(name)
    with _told(repo, revision):
        # The mixin's own from_pretrained first looks for a config.json: one more request, a warning for nothing, and
        # an error where only the clone itself is in the cache.
        published = _Published._from_pretrained(
            model_id=repo,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
    return published.file.read_bytes(), f"{FILE} of '{repo}' (force_download=True downloads it again)"


def push_to_hub(file: Path, repo_id: str, **options: Any) -> str:
    """Upload a clone's file and a model card to a repository on the hub, which is created if it does not exist.

    ``options`` as for ``ModelHubMixin.push_to_hub``.

    Returns
    -------
    The address of the commit.

    Raises
    ------
    ArchiveError
        If the clone holds what an archive may not contain.
    HubError
        If you are not logged in, may not write to the repository, or the hub cannot be reached.
    """
    return _push(file, repo_id, **options)


# What the commands do


def push(
    file: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
    revision: str | None = None,
    metadata: Mapping[str, object] | None = None,
) -> str:
    """Upload a clone's file, unchanged, and a model card to a repository on the hub; create it if necessary.

    Parameters
    ----------
    file
        A clone's file. It is checked as :func:`netclone.load` checks it before anything is sent.
    repo
        ``"user/name"``, or ``"name"`` alone for one of your own.
    private
        Whether a new repository is private. None: as your account's settings say.
    token
        Access token. None: the one you are logged in with.
    message
        Message of the commit.
    revision
        Branch to upload to. None: main.
    metadata
        Further metadata for the card: ``{"license": "mit", "base_model": "user/network"}``.

    Returns
    -------
    The address of the commit.

    Raises
    ------
    ArchiveError
        If the file is not an intact archive.
    HubError
        As for :func:`push_to_hub`.
    """
    read_archive(file)
    options: dict[str, Any] = {"private": private, "token": token, "branch": revision}
    if message:
        options["commit_message"] = message
    return _push(Path(file), repo, model_card_kwargs=dict(metadata or {}), **options)


def pull(repo: str, out: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> CloneSpec:
    """Download a repository's clone, check it, and write the same bytes to a file, or nothing at all.

    Parameters
    ----------
    repo
        ``"user/name"``.
    out
        The file to write.
    revision
        Branch, tag or commit. None: the newest on main.
    token
        Access token. None: the one you are logged in with, if any.

    Returns
    -------
    What is known about the clone.

    Raises
    ------
    ArchiveError
        If it is not an intact archive, or cannot be written.
    HubError
        As for :func:`content_of`.
    """
    path = Path(out)
    check_place(path)
    with tempfile.TemporaryDirectory() as folder:  # what is kept is the file asked for, not a second one in a cache
        with _told(repo, revision):
            file = hf_hub_download(repo, FILE, revision=revision, token=token, local_dir=folder)
        content = Path(file).read_bytes()
    spec = from_bytes(content, f"{FILE} of '{repo}'")[1]
    write_file(path, content)
    return spec


def _push(file: Path, repo: str, **options: Any) -> str:
    with _told(repo, options.get("branch")):
        if "/" not in repo:
            repo = f"{HfApi(token=options.get('token')).whoami()['name']}/{repo}"
        return str(_Published(file, repo).push_to_hub(repo, **options))


@contextmanager
def _told(repo: str, revision: str | None = None) -> Iterator[None]:
    """Raise errors of the hub and the network as HubError, and those of the local disk as ArchiveError."""
    try:
        yield
    except (NetcloneError, TypeError):  # TypeError: a keyword that the mixin does not know
        raise
    except Exception as error:  # of huggingface_hub and of what it speaks HTTP with
        for cause in _causes(error):
            if isinstance(cause, OSError) and is_of_files(cause):
                where = f"'{cause.filename}'" if cause.filename else f"what goes to or comes from '{repo}'"
                raise ArchiveError(f"cannot read or write {where}: {reason(cause)}") from error
        raise HubError(f"repo: '{repo}': {_why(error, revision)}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from; an answer of the hub has no causes but itself."""
    left: BaseException | None = error
    while left is not None and not isinstance(left, (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError)):
        yield left
        left = left.__cause__


def _why(error: BaseException, revision: str | None) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # around what an upload failed with
        return _why(error.__cause__, revision)
    if isinstance(error, HFValidationError):
        return "this is not the name of a repository; expected USER/NAME, such as 'me/herons'"
    if isinstance(error, GatedRepoError):
        return f"access has to be requested: ask for it on the repository's page, then {_LOGIN}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such model, or it is private: check the name; for a private one, {_LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision '{revision}'; create a branch with 'hf repos branch create'"
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__ or error
        return f"the hub could not be reached, and the cache has no copy: check the connection ({_said(cause)})"
    if isinstance(error, EntryNotFoundError):
        return f"it holds no clone: there is no {FILE} in it, which netclone push uploads"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"you are not logged in: {_LOGIN}"
    if status == 403:
        return f"your token does not allow this: use one with write access ({_said(error)})"
    if status is not None:
        return f"the hub refused: {_said(error)}"
    return f"the hub could not be reached, or sent an invalid answer: check the connection ({_said(error)})"


def _said(error: BaseException) -> str:
    """An error's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_LONG]}"
