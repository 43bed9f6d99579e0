"""Exports that are pushed and loaded by the real library, from a server that has the few endpoints
of the Hugging Face hub that it asks for."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import hub_stand_in
import pytest
import tiny
import tiny_exports

from dmf.checkpoints import export, load
from dmf.models.build import network
from dmf.runtime.checksums import fingerprint

TOKEN = "hf_of_nobody"
ADDRESS = re.compile(r"(/api/models)?/(?P<name>[^/]+/[^/]+)"
                     r"(?:/(?P<verb>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?")
PUSH = """
import sys
from dmf.cli import exit_codes, export
for _ in range(2):
    print(exit_codes.run(export.main, "export", sys.argv[1:]))
"""
LOAD = """
import sys, dmf
from dmf.runtime.checksums import fingerprint
for source in sys.argv[1:]:
    try:
        print(fingerprint(dmf.load(source)[0].params))
    except dmf.InputError as error:
        print(error)
"""


class Server(http.server.ThreadingHTTPServer):
    """Repositories of models, as `hub_stand_in` keeps them.

    Attributes:
      repositories: by name.
      failures: number of commits that will fail.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, hub_stand_in.Repository] = {}
        self.failures = 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    def log_message(self, *_):
        pass

    def answer(self, content, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401, X_Error_Message="Invalid "
                               "credentials in Authorization header")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            if name in self.server.repositories:
                return self.answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
            self.server.repositories[name] = hub_stand_in.Repository(private=bool(private))
            return self.answer({"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False,
                      "oid": None} for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        if self.server.failures:
            self.server.failures -= 1
            return self.answer({"error": "down"}, 503)
        return self.answer(self.commit(name, body))

    def commit(self, name: str, body: bytes) -> dict[str, str]:
        repository = self.server.repositories[name]
        files, message = dict(repository.files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                assert value["parentCommit"] == repository.newest
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        commit = repository.commit(files, message)
        return {"commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"}

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        parts = ADDRESS.fullmatch(path)
        if not parts or parts["name"] not in self.server.repositories:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound")
        repository = self.server.repositories[parts["name"]]
        revision = parts["revision"] or "main"
        commit = repository.newest if revision == "main" else revision
        with contextlib.suppress(ValueError, IndexError):
            files = repository.commits[int(commit, 16) - 1][0]
            return self.answer_of(parts, repository, commit, files)
        return self.answer({"error": "none"}, 404, X_Error_Code="RevisionNotFound")

    do_HEAD = do_GET

    def answer_of(self, parts, repository, commit, files) -> None:
        if parts["verb"] == "tree":
            return self.answer([
                {"type": "file", "path": path, "size": len(content),
                 "oid": hashlib.sha1(content).hexdigest()} for path, content in files.items()
            ])  # fmt: skip
        if parts["verb"] == "resolve":
            if parts["file"] not in files:
                return self.answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
            content = files[parts["file"]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(content, ETag=etag, X_Repo_Commit=commit)
        return self.answer({"id": parts["name"], "sha": commit, "private": repository.private,
                            "siblings": [{"rfilename": path} for path in files]})


@pytest.fixture
def server(tmp_path, monkeypatch):
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        settings = {"HF_ENDPOINT": made.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN,
                    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield made
        made.shutdown()


def loaded(*sources: str) -> list[str]:
    """The fingerprints of the parameters of checkpoints, or why they are refused."""
    done = tiny.process(*sources, code=LOAD)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_real_library_pushes_and_loads(server, tmp_path):
    """Pushed by the same command after a failure; loaded, at last without a network."""
    config = tiny.config({"model.depth": 1, "model.width": 8, "model.heads": 1})
    flow = network(config.model)
    params, local = tiny_exports.params(flow), tmp_path / "local"
    export.write(local, export.Parts(flow, load.config_to_json(config), params, "drawn"))
    done = tiny.process(f"--checkpoint={local}", "--push=me/maps", "--license=mit", "--private",
                        code=PUSH)
    repository = server.repositories["me/maps"]
    url = f"{server.url}/me/maps/commit/{repository.newest}"
    assert done.stdout.splitlines() == ["1", url, "0"], done.stderr
    assert "push=me/maps: the hub cannot be reached, or failed (HfHubHTTPError: " in done.stderr
    assert repository.private and len(repository.commits) == 2
    assert b"\nlicense: mit\n" in repository.files["README.md"].split(b"---\n")[1]
    assert repository.files["checksums.json"] == (local / "checksums.json").read_bytes()
    address = "hf:me/maps"
    results = loaded(address, f"{address}@{repository.newest}", "hf:me/none", f"{address}@v9",
                     f"{address}@{1:040x}")
    assert results[:2] == [fingerprint(params)] * 2
    for result, words in zip(results[2:], (
        "there is no such repository, or it is private", "the repository has no such revision",
        "it holds no export of dmf, and no weights"), strict=True):  # fmt: skip
        assert words in result
    server.shutdown()
    server.server_close()
    result, refusal = loaded(address, "hf:me/other")
    assert result == fingerprint(params) and "it cannot be downloaded (" in refusal
