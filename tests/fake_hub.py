"""A local HTTP server with the endpoints of the Hugging Face Hub that push and pull a model.

Commits are whole trees; every file is a regular one (no LFS). A write needs `Bearer hf_good`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """refs: branch -> commit; commits: commit -> its files by name."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """A new tree on a branch -> its hash."""
        commit = hashlib.sha1(f"{branch}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


@dataclass
class Hub:
    """The server's repositories, the requests so far ("POST /api/repos/create"), its address."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer in two packets waits 40 ms in between

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def _send(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _commit(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """The commit that is asked for; None when the answer was an error."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._refuse(404, "RepoNotFound")
            return None
        commit = repository.refs.get(unquote(revision), unquote(revision))
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return repository, commit

    def do_GET(self) -> None:
        """Repository info, tree, file."""
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], unquote(found[3]))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self._tree(found[1], found[2])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        else:
            self._refuse(404, "Unknown")

    do_HEAD = do_GET

    def _tree(self, repo_id: str, revision: str) -> None:
        if at := self._commit(repo_id, revision):
            repository, commit = at
            files = repository.commits[commit]
            self._send(200, [{"type": "file", "path": name, "size": len(files[name]),
                              "oid": _oid(files[name])} for name in files])

    def _info(self, repo_id: str, revision: str) -> None:
        if at := self._commit(repo_id, revision):
            repository, commit = at
            files = [{"rfilename": name} for name in repository.commits[commit]]
            self._send(200, {"id": repo_id, "sha": commit, "private": repository.private,
                             "siblings": files})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        at = self._commit(repo_id, revision)
        if at is None:
            return
        repository, commit = at
        content = repository.commits[commit].get(name)
        if content is None:
            self._refuse(404, "EntryNotFound")
        else:
            self._send(200, content, ETag=f'"{_oid(content)}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        """Create a repository or a branch, say how files are sent, commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != "Bearer hf_good":
            self._refuse(403, "Forbidden")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = self.hub.repositories[found[1]]
            repository.refs.setdefault(unquote(found[2]), repository.refs["main"])
            self._send(200)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            self._send(200, {"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            lines = [json.loads(line) for line in body.splitlines()]
            self._make_commit(found[1], unquote(found[2]), lines)
        else:
            self._refuse(404, "Unknown")

    def _create(self, asked: dict) -> None:
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo",
                             "url": f"{self.hub.address}/{repo_id}"})
            return
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[repo_id] = repository
        self._send(200, {"url": f"{self.hub.address}/{repo_id}"})

    def _make_commit(self, repo_id: str, branch: str, lines: list[dict]) -> None:
        repository = self.hub.repositories[repo_id]
        branch = "refs/pr/1" if "create_pr=1" in self.path else branch
        files = dict(repository.commits[repository.refs.get(branch, repository.refs["main"])])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        commit = repository.commit(branch, files)
        at = f"{self.hub.address}/{repo_id}"
        self._send(200, {"success": True, "commitUrl": f"{at}/commit/{commit}", "commitOid": commit,
                         "pullRequestUrl": f"{at}/discussions/1"})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on this machine while the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01},
                              daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
