"""Clones on the hub: the folder, the card, and the wire, against a server that runs in a thread of the test."""

import base64
import errno
import hashlib
import inspect
import json
import os
import re
import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelHubMixin, close_session, constants
from limits import alone
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from netclone import CloneModule, extract, load, localize, save
from netclone.cli import app
from netclone.errors import ArchiveError, HubError
from netclone.files import publishing
from netclone.files.publishing import FILE, pull, push
from netclone.files.spec import Candidate
from netclone.graph.tracing import same_bits

NASTY = "[x](http://e.e) | <b>*_`{{ 7 * 7 }}`_*</b> --- license: mit # gnp"


@pytest.fixture(scope="module")
def clone():
    source = timm.create_model("test_resnet", num_classes=4)
    module = extract(source, localize(source, method="magnitude"), classes=[1, 3], class_names=["heron", "grey_ibis"])
    tried = (Candidate("layer3", "layer3", None, "no map"), Candidate("input", None, 0.875))
    return module.with_spec(at="input", search=tried, scores=(("all", 0.875), ("old", 0.9375)))


@pytest.fixture(scope="module")
def file(clone, tmp_path_factory):
    path = tmp_path_factory.mktemp("clone") / "herons.safetensors"
    save(clone, path)
    return path


def same(a, b):
    tensors = a.state_dict(), b.state_dict()
    names = tensors[0].keys() == tensors[1].keys()
    return a.spec == b.spec and names and all(same_bits(tensors[0][n], tensors[1][n]) for n in tensors[0])


# The folder


def test_the_folder_holds_the_archive_and_a_card_and_nothing_else(clone, file, tmp_path):
    folder = tmp_path / "made" / "herons"
    assert clone.save_pretrained(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", FILE]
    assert (folder / FILE).read_bytes() == file.read_bytes()
    assert same(CloneModule.from_pretrained(folder), clone)
    assert same(CloneModule.from_pretrained(str(folder)), load(file))


def test_a_card_that_is_there_stays_and_a_config_is_written_if_asked_for(clone, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    clone.save_pretrained(tmp_path, config={"a": 1})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


def test_the_card_says_what_is_known(clone, file, tmp_path):
    clone.save_pretrained(tmp_path, model_card_kwargs={"license": "mit", "base_model": "me/network"})
    card = ModelCard.load(tmp_path / "README.md")
    facts = {"library_name": "netclone", "pipeline_tag": "image-classification", "license": "mit"}
    assert facts.items() <= card.data.to_dict().items()
    assert card.data.base_model == "me/network"
    assert {"netclone", "partial-network-cloning"} <= set(card.data.tags)
    rows = cells(card.text)
    assert ["classes", "1 heron, 3 grey_ibis"] in rows
    assert ["grafted at", "input"] in rows
    assert ["all", "0.875"] in rows and ["old", "0.9375"] in rows
    assert ["layer3", "layer3", "", "no map"] in rows and ["input", "input", "87.5%", ""] in rows
    assert any(row[0] == "certificate" and f"{clone.certificate:.1e}" in row[1] for row in rows)
    assert any(row[0] == "size" and f"{file.stat().st_size:,} bytes" in row[1] for row in rows)
    assert ["source's structure (SHA-256)", clone.spec.source_fingerprint] in rows
    for part in ("from_pretrained(", "netclone pull", "2303.10597", "@inproceedings"):
        assert part in card.text


def test_a_card_without_a_license_leaves_it_to_the_user_and_one_without_scores_says_so(clone, tmp_path):
    clone.with_spec(scores=(), search=(), at=None).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert "extracted and not fitted" in card.text
    assert "Positions tried" not in card.text
    assert 'inject(target, clone, at="POSITION")' in card.text


def test_text_of_the_archive_shows_as_itself_in_the_card(clone, tmp_path):
    """Class names and reasons may come from anyone: they are no markup, no template and no metadata."""
    tried = (Candidate(NASTY, NASTY, 0.5, NASTY),) * 200
    nasty = clone.with_spec(class_names=(NASTY, "`"), search=tried, scores=((NASTY, 0.5),), source_fingerprint=NASTY)
    nasty.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    rows = cells(card.text)
    assert [NASTY, NASTY, "50.0%", NASTY] in rows
    assert [NASTY, "0.5"] in rows
    assert ["and 100 more", "", "", ""] in rows
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert re.findall('href="([^"]*)"', html) == ["https://arxiv.org/abs/2303.10597"]
    assert "<b>" not in html


@pytest.mark.parametrize(
    "hidden", ["a\n---\nlicense: mit", "\u202egnp", "a\0", "\x1b[2J", "\u200b", "\ud800", "x" * 20_000]
)
def test_no_card_is_written_of_text_that_steers_what_shows_it(clone, tmp_path, hidden):
    for field in ({"class_names": (hidden, "b")}, {"scores": ((hidden, 0.5),)}, {"source_fingerprint": hidden}):
        with pytest.raises(ArchiveError, match="expected text without control characters"):
            clone.with_spec(**field).save_pretrained(tmp_path / "clone")
    assert not (tmp_path / "clone").exists()


def cells(text):
    """The text of the rows of all tables, as a browser would show it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    rows = []
    for token, before in zip(tokens[1:], tokens, strict=False):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("td_open", "th_open"):
            assert all(child.type in ("text", "text_special") for child in token.children), token.content
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_methods_have_the_keywords_of_the_mixin():
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        theirs, ours = (inspect.signature(getattr(owner, name)).parameters for owner in (ModelHubMixin, CloneModule))
        assert [n for n in theirs if n != "model_kwargs"] == list(ours)
        assert all(ours[n].kind == theirs[n].kind and ours[n].default == theirs[n].default for n in ours)


def test_what_is_no_folder_of_a_clone_says_the_way_out(clone, tmp_path):
    with pytest.raises(ArchiveError, match=f"holds no {FILE}; write one with module.save_pretrained"):
        CloneModule.from_pretrained(tmp_path)
    plain = tmp_path / "plain.safetensors"
    plain.write_bytes(b"")
    with pytest.raises(ArchiveError, match="is a file.*netclone.load"):
        CloneModule.from_pretrained(plain)
    with pytest.raises(ArchiveError, match="cannot write .*plain.safetensors"):
        clone.save_pretrained(plain)
    clone.save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-4] + b"abcd")
    with pytest.raises(ArchiveError, match="digest"):
        CloneModule.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unknown"):
        clone.save_pretrained(tmp_path, unknown=1, push_to_hub=True)


# The wire


class Hub:
    """As much of a hub as is asked for when a clone is pushed and pulled."""

    def __init__(self, mode):
        self.mode = mode
        self.token = "hf_right"
        self.repos = {"me/taken": {"main": []}}
        self.large = {}
        self.asked = []
        self.visibility = {}
        self.gated = set()
        self.messages = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def files(self, repo, revision="main"):
        """Those of a branch or commit: the last commit of a branch counts."""
        for branch, commits in self.repos[repo].items():
            if branch == revision and commits:
                return commits[-1][1], commits[-1][0]
            for oid, files in commits:
                if oid == revision:
                    return files, oid
        return ({}, "0" * 40) if revision in self.repos[repo] else None

    def post(self, path, body, token):
        """Status, headers and answer."""
        if path == "/api/validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if re.fullmatch(r"/upload/(\w+)", path):
            self.large[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if token != self.token:
            return 401, {}, {"error": "Invalid username or password."}
        data = [json.loads(line) for line in body.splitlines()] if body else []
        if path == "/api/repos/create":
            if data[0]["organization"] not in ("me", None):
                return 403, {}, {"error": "You don't have the rights"}
            repo = f"me/{data[0]['name']}"
            known = repo in self.repos
            self.repos.setdefault(repo, {"main": []})
            self.visibility.setdefault(repo, data[0].get("visibility"))
            return 409 if known else 200, {}, {"url": f"{self.address}/{repo}"}
        if found := re.fullmatch(r"/(.+).git/info/lfs/objects/batch", path):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.address}/upload/{item['oid']}"}}}
                for item in data[0]["objects"]
            ]
            return 200, {}, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/(\w+)", path)
        repo, what, branch = found.groups()
        if branch not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        if what == "preupload":
            names = [item["path"] for item in data[0]["files"]]
            modes = [self.mode if name.endswith(".safetensors") else "regular" for name in names]
            files = [
                {"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in zip(names, modes, strict=True)
            ]
            return 200, {}, {"files": files}
        files = dict(self.files(repo, branch)[0])
        for line in data:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                self.messages.append(value["summary"])
        oid = hashlib.sha1(body).hexdigest()
        self.repos[repo][branch].append((oid, files))
        return 200, {}, {"commitUrl": f"{self.address}/{repo}/commit/{oid}", "commitOid": oid}

    def get(self, path, token):
        if path == "/api/whoami-v2":
            return (200, {}, {"name": "me"}) if token == self.token else (401, {}, {"error": "Invalid credentials"})
        found = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/resolve/([^/]+)/(.+))?", path)
        repo, revision, name = found.groups()
        if repo not in self.repos or (self.visibility.get(repo) == "private" and token != self.token):
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, {"error": "gated"}
        if name is None:
            return 200, {}, {"id": repo, "sha": self.files(repo)[1]}
        known = self.files(repo, revision)
        if known is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        files, oid = known
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}, {"error": "Entry not found"}
        etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
        return 200, {"X-Repo-Commit": oid, "ETag": etag}, files[name]

    def handler(hub):
        class Handler(BaseHTTPRequestHandler):
            def do(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                path = self.path.partition("?")[0]
                hub.asked.append((self.command, path, token))
                if self.command in ("POST", "PUT"):
                    status, headers, answer = hub.post(path, body, token)
                else:
                    status, headers, answer = hub.get(path, token)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = do

            def log_message(self, *arguments):
                pass

        return Handler


def pointed_at(address, monkeypatch, tmp_path):
    """What HF_ENDPOINT, HF_HOME and the like would do if they were read more than once."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["lfs", "regular"])
def hub(request, monkeypatch, tmp_path):
    """Files go as large ones, over git's protocol, or inside the commit; xet's storage is not in it."""
    made = Hub(request.param)
    pointed_at(made.address, monkeypatch, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")


def test_what_is_pulled_is_what_was_pushed_to_the_byte(hub, file, tmp_path, logged_in):
    url = push(file, "me/herons", private=True, message="Herons", metadata={"license": "mit"})
    oid = hub.files("me/herons")[1]
    assert url == f"{hub.address}/me/herons/commit/{oid}"
    assert hub.visibility == {"me/herons": "private"}
    assert hub.messages == ["Herons"]
    stored = hub.files("me/herons")[0]
    assert stored.keys() == {"README.md", FILE}
    assert stored[FILE] == file.read_bytes()
    card = ModelCard(stored["README.md"].decode())
    assert card.data.license == "mit"
    assert 'from_pretrained("me/herons")' in card.text and "netclone pull me/herons" in card.text
    out = tmp_path / "out.safetensors"
    assert pull("me/herons", out) == load(file).spec
    assert out.read_bytes() == file.read_bytes()
    assert not (tmp_path / "cache" / "models--me--herons").exists()  # one file, the one asked for


def test_a_module_goes_to_the_hub_and_comes_back(hub, clone, file, tmp_path):
    url = clone.push_to_hub("herons", token="hf_right")  # a name of one's own
    assert url.startswith(f"{hub.address}/me/herons/commit/")
    assert 'from_pretrained("me/herons")' in hub.files("me/herons")[0]["README.md"].decode()
    back = CloneModule.from_pretrained("me/herons", cache_dir=tmp_path / "mine")
    assert same(back, clone)
    images = torch.randn(1, 3, 160, 160)
    assert same_bits(back(images), clone.eval()(images))
    assert not any(path.endswith("config.json") for _, path, _ in hub.asked)
    assert [token for method, path, token in hub.asked if "resolve" in path] == ["", ""]  # HEAD and GET
    before = len(hub.asked)
    cached = CloneModule.from_pretrained("me/herons", cache_dir=tmp_path / "mine", local_files_only=True)
    assert same(cached, clone) and len(hub.asked) == before


def test_save_pretrained_pushes_too(hub, clone, tmp_path, logged_in):
    url = clone.save_pretrained(tmp_path / "herons", repo_id="me/herons", push_to_hub=True, private=True)
    assert url == f"{hub.address}/me/herons/commit/{hub.files('me/herons')[1]}"
    assert hub.visibility == {"me/herons": "private"}
    assert (tmp_path / "herons" / FILE).read_bytes() == hub.files("me/herons")[0][FILE]


def test_revisions_are_kept_apart(hub, clone, file, tmp_path, logged_in):
    push(file, "me/herons")
    first = hub.files("me/herons")[1]
    other = clone.with_spec(scores=(("all", 0.5),))
    other.push_to_hub("me/herons")
    hub.repos["me/herons"]["next"] = []
    push(file, "me/herons", revision="next")
    assert same(CloneModule.from_pretrained("me/herons"), other)
    for revision in (first, "next"):
        assert same(CloneModule.from_pretrained("me/herons", revision=revision), clone)
        pull("me/herons", tmp_path / "old.safetensors", revision=revision)
        assert (tmp_path / "old.safetensors").read_bytes() == file.read_bytes()
    with pytest.raises(HubError, match="has no revision 'v9'; create a branch with 'hf repos branch create'"):
        push(file, "me/herons", revision="v9")
    with pytest.raises(HubError, match="has no revision 'v9'"):
        CloneModule.from_pretrained("me/herons", revision="v9")


def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub, clone, file, tmp_path):
    hub.gated.add("me/taken")
    out = tmp_path / "out.safetensors"
    for call in (lambda repo: pull(repo, out), CloneModule.from_pretrained):
        with pytest.raises(HubError, match="repo: 'me/none': there is no such model.*'hf auth login'"):
            call("me/none")
        with pytest.raises(HubError, match="repo: 'me/taken': access has to be requested: ask for it"):
            call("me/taken")
        with pytest.raises(HubError, match="repo: 'a b': this is not the name of a repository; expected USER/NAME"):
            call("a b")
    for call in (lambda **options: push(file, "me/herons", **options), lambda **o: clone.push_to_hub("herons", **o)):
        with pytest.raises(HubError, match="you are not logged in: log in with 'hf auth login', set HF_TOKEN"):
            call()
        with pytest.raises(HubError, match="you are not logged in"):
            call(token="hf_wrong")
    with pytest.raises(HubError, match="does not allow this: use one with write access") as caught:
        push(file, "others/herons", token="hf_right")
    assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()


def test_a_repository_without_a_clone_or_with_a_damaged_one_writes_nothing(hub, file, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    for call in (lambda: pull("me/taken", out), lambda: CloneModule.from_pretrained("me/taken")):
        with pytest.raises(HubError, match=f"holds no clone: there is no {FILE} in it"):
            call()
    damaged = file.read_bytes()[:-4] + b"abcd"
    hub.repos["me/taken"]["main"].append(("1" * 40, {FILE: damaged}))
    for call in (lambda: pull("me/taken", out), lambda: CloneModule.from_pretrained("me/taken")):
        with pytest.raises(ArchiveError, match=f"cannot read {FILE} of 'me/taken'.*digest"):
            call()
    assert out.read_bytes() == b"before"
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(damaged)
    asked = len(hub.asked)
    with pytest.raises(ArchiveError, match="digest"):
        push(bad, "me/herons", token="hf_right")
    for where, why in ((tmp_path, "it is a folder"), (tmp_path / "none" / "out", "there is no folder")):
        with pytest.raises(ArchiveError, match=why):
            pull("me/taken", where)
    assert len(hub.asked) == asked  # refused before anything was sent


def test_without_a_hub_the_cache_is_named(file, monkeypatch, tmp_path):
    pointed_at("http://127.0.0.1:9", monkeypatch, tmp_path)  # the port of a service that throws everything away
    monkeypatch.setattr(
        time, "sleep", lambda seconds: None
    )  # huggingface_hub tries six times, further and further apart
    for call in (lambda: pull("me/herons", tmp_path / "out"), lambda: CloneModule.from_pretrained("me/herons")):
        with pytest.raises(HubError, match="could not be reached, and the cache has no copy: check the connection"):
            call()
    with pytest.raises(HubError, match="could not be reached"):
        push(file, "me/herons", token="hf_right")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    try:
        with pytest.raises(HubError, match="could not be reached"):
            push(file, "me/herons", token="hf_right")
    finally:
        close_session()


def test_the_commands_push_and_pull(hub, file, tmp_path, logged_in):
    pushed = CliRunner().invoke(app, ["push", str(file), "me/herons", "--license", "mit", "--json"])
    assert pushed.exit_code == 0, pushed.output
    assert json.loads(pushed.stdout)["url"].startswith(f"{hub.address}/me/herons/commit/")
    assert "license: mit" in hub.files("me/herons")[0]["README.md"].decode()
    out = tmp_path / "pulled.safetensors"
    pulled = CliRunner().invoke(app, ["pull", "me/herons", "--out", str(out)])
    assert pulled.exit_code == 0, pulled.output
    assert "1 heron, 3 grey_ibis" in pulled.stdout
    assert out.read_bytes() == file.read_bytes()
    refused = CliRunner().invoke(app, ["pull", "me/storks", "--out", str(tmp_path / "none.safetensors")])
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: repo: 'me/storks': there is no such model")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_full_disk_is_no_fault_of_the_hub(clone, tmp_path):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        clone.save_pretrained(tmp_path / "clone", config={"notes": "x" * 1_000_000})

    ended = alone(run)
    assert ended.kind == "raised" and ended.text.startswith("ArchiveError: cannot"), ended
    assert "could not be reached" not in ended.text


def test_a_cache_on_a_full_disk_is_no_fault_of_the_hub_either(monkeypatch):
    def download(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache/blob")

    monkeypatch.setattr(publishing, "hf_hub_download", download)
    with pytest.raises(ArchiveError, match=r"'cache/blob': No space left on device; make room"):
        publishing.content_of("me/herons")
