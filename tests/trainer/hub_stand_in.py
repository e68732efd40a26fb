"""A stand-in of the Hugging Face hub: the requests that an upload makes, answered by a local server."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_goodtokenoftests"


@dataclass
class StandIn:
    """State of the hub.

    Attributes:
        url: of the server.
        fails_with: status of every answer; None: requests with `TOKEN` succeed.
        private: repository -> True if only its owner sees it.
        files: repository -> path -> content.
        blobs: content of large files by their hash.
    """

    url: str = ""
    fails_with: int | None = None
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

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


@contextmanager
def hub_stand_in() -> Iterator[StandIn]:
    """Context of a running stand-in."""
    hub = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, reply = self.reply(body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
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

        do_GET = do_POST = do_PUT = answer

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
