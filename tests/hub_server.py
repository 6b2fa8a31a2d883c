"""A stand-in for the Hugging Face Hub on this machine, as far as `tpaw push` asks it.

Large files come by Git LFS in one part, as a client without Xet sends them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_the_test"
USER = "me"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Repository:
    """Files, and the commits that made them."""

    def __init__(self, private=False):
        self.private = private
        self.files: dict[str, bytes] = {".gitattributes": ATTRIBUTES}
        self.commits: list[dict[str, Any]] = []

    @property
    def sha(self):
        return hashlib.sha1(repr([*self.commits, sorted(self.files.items())]).encode()).hexdigest()

    @property
    def tags(self):
        found = re.match(r"---\n(.*?)\n---\n", self.files.get("README.md", b"").decode(), re.S)
        return (yaml.safe_load(found[1]) or {}).get("tags", []) if found else []


class HubServer:
    """Serves repositories of models.

    Attributes:
        repositories: by id.
        requests: method and path of each request.
        refused: a part of a path, and the status that its requests get.
        hold: called with the path before a request is answered.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refused: dict[str, int] = {}
        self.hold = lambda path: None
        self._large: dict[str, bytes] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                outer.requests.append(f"{self.command} {path}")
                outer.hold(path)
                status, content, headers = outer.reply(self.command, path, body, self.headers)
                data = json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has left
                    pass

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, method, path, body, headers):
        """Status, content and headers."""
        for part, status in self.refused.items():
            if part in path:
                return status, {"error": "refused by the test"}, {}
        if method == "PUT":  # to where the files lie, which needs no token
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            self._large[oid] = body
            return 200, {}, {}
        if path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.S)
            wrong = [] if front and yaml.safe_load(front[1]) else [{"message": "no metadata"}]
            return (400 if wrong else 200), {"errors": wrong, "warnings": []}, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": USER, "orgs": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(/revision/main|/preupload/main|"
            r"/commit/main|/info/lfs/objects/batch|/verify)?",
            path,
        )
        repository = self.repositories.get(found[1]) if found else None
        if repository is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        name, what = found[1], found[2]
        if what in (None, "/revision/main"):
            return 200, self._described(name, repository), {}
        if what == "/verify":
            return 200, {}, {}
        if what == "/preupload/main":
            return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}, {}
        if what == "/info/lfs/objects/batch":
            return 200, self._batch(name, json.loads(body)), {}
        return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def _create(self, asked):
        if asked["organization"] != USER:
            return 403, {"error": "You don't have the rights to create a model there"}, {}
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo"}, {}
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        return 200, {"url": f"{self.url}/{name}"}, {}

    def _described(self, name, repository):
        return {
            "id": name,
            "sha": repository.sha,
            "private": repository.private,
            "tags": repository.tags,
            "siblings": [{"rfilename": path} for path in sorted(repository.files)],
        }

    def _batch(self, name, asked):
        assert "basic" in asked["transfers"]
        actions = {
            o["oid"]: {
                "upload": {"href": f"{self.url}/large/{o['oid']}"},
                "verify": {"href": f"{self.url}/{name}/verify"},
            }
            for o in asked["objects"]
        }
        return {"objects": [{**o, "actions": actions[o["oid"]]} for o in asked["objects"]]}

    def _commit(self, name, repository, lines):
        header, *operations = lines
        assert header["key"] == "header"
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repository.sha:
            return 412, {"error": "A commit has happened since"}, {}
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        repository.files = files
        repository.commits.append(header["value"])
        url = f"{self.url}/{name}/commit/{repository.sha}"
        return 200, {"success": True, "commitUrl": url, "commitOid": repository.sha}, {}


def _mode(file):
    large = file["path"].endswith(".safetensors")
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }
