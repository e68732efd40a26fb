"""A stand-in of the Hugging Face hub: what uploads and downloads ask for, answered by a local server."""

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
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_goodtokenoftests"


@dataclass
class Published:
    """A repository to download from.

    Attributes:
        commits: files of each commit.
        refs: commit of each branch and tag.
        is_gated: its files need `TOKEN`, its name is seen by all.
        is_private: without `TOKEN` it is not there.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: dict[str, bytes], *refs: str) -> str:
        """A new commit with these files alone, which `main` and `refs` then name."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.refs |= dict.fromkeys(("main", *refs), sha)
        return sha

    def sha(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class StandIn:
    """State of the hub.

    Attributes:
        url: of the server.
        fails_with: status of every answer; None: requests with `TOKEN` succeed.
        published: repositories to download from, as datasets/OWNER/NAME or models/OWNER/NAME.
        downloads: path of each file that was sent, with the number of bytes.
        private: repository -> True if only its owner sees it.
        files: repository -> path -> content.
        blobs: content of large files by their hash.
    """

    url: str = ""
    fails_with: int | None = None
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    published: dict[str, Published] = field(default_factory=dict)
    downloads: list[tuple[str, int]] = field(default_factory=list)

    def publish(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
        """Commit files to a repository to download from, such as datasets/me/numbers; gives the commit."""
        return self.published.setdefault(repo, Published()).commit(files, *refs)

    def create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.files else 200
        self.files.setdefault(repo, {})
        self.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
        return status, {"url": f"{self.url}/{repo}"}

    def validate_yaml(self, body: bytes) -> tuple[int, Any]:
        return 200, {"errors": [], "warnings": []}

    def preupload(self, repo: str, body: bytes) -> tuple[int, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in paths}
        return 200, {
            "files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
        }

    def lfs_batch(self, repo: str, body: bytes) -> tuple[int, Any]:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo: str, body: bytes) -> tuple[int, Any]:
        files = self.files[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/1", "commitOid": "1"}

    def tree(self, repo: str, body: bytes) -> tuple[int, Any]:
        entries = self.files[repo].items()
        return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in entries]

    def upload(self, oid: str, body: bytes) -> tuple[int, Any]:
        self.blobs[oid] = body
        return 200, {}

    def info(self, repo: str, body: bytes) -> tuple[int, Any]:
        return (200, {"id": repo}) if repo in self.files else (404, {"error": "Repository not found"})


_ROUTES = {
    r"POST /api/repos/create": StandIn.create,
    r"POST /api/validate-yaml": StandIn.validate_yaml,
    r"POST /api/models/(.+)/preupload/main": StandIn.preupload,
    r"POST /(.+)\.git/info/lfs/objects/batch": StandIn.lfs_batch,
    r"POST /api/models/(.+)/commit/main": StandIn.commit,
    r"GET /api/models/(.+)/tree/main\?.*": StandIn.tree,
    r"GET /api/models/([^/]+/[^/?]+)": StandIn.info,
    r"PUT /upload/(.+)": StandIn.upload,
}


@dataclass
class Reply:
    """An answer: JSON, or the bytes of a file."""

    status: int
    content: Any = None
    headers: dict[str, str] = field(default_factory=dict)


def refused(status: int, code: str, message: str) -> Reply:
    """An error as the hub names it."""
    return Reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


_INFO = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/revision/(.+))?")
_TREE = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)")
_PATHS = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def download_reply(hub: StandIn, path: str, headers: Any, body: bytes) -> Reply | None:
    """Answer to a request of a download; None: it is none, or of a repository that is not published."""
    url = urlsplit(path)
    matches = ((pattern.fullmatch(url.path), pattern) for pattern in (_TREE, _PATHS, _INFO, _FILE))
    found, pattern = next(((match, pattern) for match, pattern in matches if match), (None, _FILE))
    if found is None:
        return None
    answer = {_TREE: _tree, _PATHS: _paths_info, _INFO: _info, _FILE: _file}[pattern]
    kind, repo, revision, *rest = (unquote(part) if part else "" for part in found.groups())
    published = hub.published.get(f"{(kind or 'models').rstrip('/')}/{repo}")
    knows_token = headers.get("Authorization") == f"Bearer {TOKEN}"
    if published is None or (published.is_private and not knows_token):
        return (
            None if repo in hub.files or knows_token else refused(401, "RepoNotFound", "Repository not found")
        )
    sha = published.sha(revision or "main")
    if sha is None:
        return refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if published.is_gated and not knows_token and pattern is _FILE:
        return refused(403, "GatedRepo", f"Access to {repo} is restricted")
    query = {**parse_qs(url.query), **parse_qs(body.decode(errors="ignore"))}
    reply = answer(published, sha, rest[0] if rest else "", query | {"range": [headers.get("Range") or ""]})
    if pattern is _FILE and isinstance(reply.content, bytes):
        hub.downloads.append((rest[0], len(reply.content)))
    if pattern is _INFO:
        reply.content["id"] = repo
    return reply


def _info(repo: Published, sha: str, path: str, query: dict[str, list[str]]) -> Reply:
    siblings = [{"rfilename": name} for name in repo.commits[sha]]
    gated = "auto" if repo.is_gated else False
    return Reply(200, {"sha": sha, "siblings": siblings, "gated": gated, "private": repo.is_private})


def _tree(repo: Published, sha: str, path: str, query: dict[str, list[str]]) -> Reply:
    inside = {name for name in repo.commits[sha] if not path or name.startswith(f"{path}/")}
    if path and not inside:
        return refused(404, "EntryNotFound", f"{path} does not exist")
    start = len(path) + 1 if path else 0
    depths = {name: name[start:].count("/") for name in inside}
    folders = {
        name[: start + at] for name in inside for at, character in enumerate(name[start:]) if character == "/"
    }
    if query.get("recursive", ["false"])[0].lower() != "true":
        inside = {name for name in inside if depths[name] == 0}
        folders = {name for name in folders if name.count("/", start) == 0}
    entries = [_entry(repo, sha, name) for name in sorted(folders | inside)]
    return Reply(200, entries)


def _paths_info(repo: Published, sha: str, path: str, query: dict[str, list[str]]) -> Reply:
    files = repo.commits[sha]
    asked = [name for name in query.get("paths", []) if any(f"{f}/".startswith(f"{name}/") for f in files)]
    return Reply(200, [_entry(repo, sha, name) for name in asked])


def _entry(repo: Published, sha: str, name: str) -> dict[str, Any]:
    content = repo.commits[sha].get(name)
    if content is None:
        return {"type": "directory", "path": name, "oid": _etag(name.encode())}
    return {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}


def _file(repo: Published, sha: str, path: str, query: dict[str, list[str]]) -> Reply:
    content = repo.commits[sha].get(path)
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    if content is None:
        missing = refused(404, "EntryNotFound", f"{path} does not exist")
        missing.headers |= headers
        return missing
    headers["ETag"] = f'"{_etag(content)}"'
    if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", query["range"][0]):
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Reply(206, content[start : end + 1], headers)
    return Reply(200, content, headers)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_stand_in() -> Iterator[StandIn]:
    """Context of a running stand-in."""
    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = None if hub.fails_with else download_reply(hub, self.path, self.headers, body)
            reply = reply or Reply(*self.reply(body))
            content = reply.content
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def reply(self, body: bytes) -> tuple[int, Any]:
            is_upload = self.path.startswith("/upload/")
            if hub.fails_with:
                return hub.fails_with, {"error": "no"}
            if not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return 401, {"error": "Invalid username or password."}
            for pattern, method in _ROUTES.items():
                if found := re.fullmatch(pattern, f"{self.command} {self.path}"):
                    return method(hub, *found.groups(), body)
            return 404, {"error": f"no route for {self.command} {self.path}"}

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def log_message(self, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
