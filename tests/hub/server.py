"""A small hub on 127.0.0.1, as far as `huggingface_hub` needs one to push and load models; it can cut connections, or
keep silent.

Files of more than a few bytes that are not text go through LFS, as on the hub, unless `lfs` is switched off: then
everything is part of the commit. Commits are atomic, and refused if LFS objects that they name have not arrived.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

TOKEN = "hf_SecretSecretSecretSecretSecret0000"
USER = "someone"
STAGES = {
    "create": r"POST /api/repos/create",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/.*)?",
    "preupload": r"POST /api/models/.*/preupload/.*",
    "batch": r"POST /.*/info/lfs/objects/batch",
    "put": r"PUT /lfs/.*",
    "commit": r"POST /api/models/.*/commit/.*",
}
MOMENTS = ("before", "middle", "after", "answer")
"""Where a connection is cut: the request unread, read in part, obeyed without an answer, or answered in part."""


@dataclass
class Repo:
    """Branches and commits; a commit maps paths to (content, whether it is in LFS)."""

    private: bool
    commits: dict = field(default_factory=lambda: {"0" * 40: {".gitattributes": (b"", False)}})
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own; use as a context manager."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.lfs = True
        self.echo_token = False
        self.fault: dict | None = None
        self.cuts: list[str] = []
        self.silent: str | None = None
        self.closing = threading.Event()
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def stand_in(self, monkeypatch):
        """Take the real hub's place in this process."""
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        found = self.repos[repo]
        return {path: content for path, (content, _) in found.commits[found.branches[revision]].items()}

    def plan_fault(self, seed: int) -> dict:
        """Cut the next upload somewhere: which stage, where in it, and whether the hub stays away after that."""
        draw, stages = random.Random(seed), [*STAGES, "commit"]  # where most could go wrong, twice as often
        stage, moment = stages[seed % len(stages)], draw.choice(MOMENTS)
        self.fault = {"stage": stage, "moment": moment, "lasting": draw.random() < 0.5, "draw": draw}
        return self.fault

    def handle_error(self, request, client_address):
        """Connections that are cut are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *_):
        pass

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/control":
            return self.control()
        fault, line = self.server.fault, f"{self.command} {path}"
        self.server.log.append(line)
        if self.server.silent and re.fullmatch(STAGES[self.server.silent], line):
            self.server.closing.wait()
            return self.cut()
        # Once it has struck, a lasting fault takes everything down.
        hit = fault and ("struck" in fault or re.fullmatch(STAGES.get(fault["stage"], ""), line))
        moment = None
        if hit:
            moment = "before" if "struck" in fault else fault["moment"]
            if "struck" not in fault:
                self.server.cuts.append(f"{fault['stage']}: {moment}{', lasting' if fault['lasting'] else ''}")
            fault["struck"] = True
            if not fault["lasting"]:
                self.server.fault = None
        if moment == "before":
            return self.cut()
        if moment == "middle":
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(fault["draw"].randrange(length) if length > 1 else 0)
            return self.cut()
        body = self.body()
        try:
            with self.server.lock:
                status, headers, content = self.answer(path, body)
        except Refused as refused:
            message = refused.message + (self.headers.get("Authorization", "") if self.server.echo_token else "")
            status, content = refused.status, json.dumps({"error": message}).encode()
            headers = {"Content-Type": "application/json", "X-Error-Message": message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
        if moment == "after":
            return self.cut()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if moment == "answer" else content)
        if moment == "answer":
            self.wfile.flush()
            return self.cut()

    def control(self):
        """Settings of the server, for clients in other processes: {"lfs": bool, "fault": seed or null}."""
        asked = json.loads(self.body())
        self.server.lfs = asked.get("lfs", self.server.lfs)
        self.server.fault = None
        if asked.get("fault") is not None:
            self.server.plan_fault(asked["fault"])
        self.send_response(204)
        self.end_headers()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, path: str, body: bytes) -> tuple[int, dict, bytes]:
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "PUT":
            return self.put(path, body)
        if self.command == "POST" and not signed:
            raise Refused(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return as_json({"name": USER, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.batch(found[1], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, sha = self.at(found[1], found[2], signed)
            return self.resolve(repo, sha, found[3])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)/?(.*))?", path):
            return self.model(*found.groups(), body, signed)
        raise Refused(404, f"no such address: {path}", "EntryNotFound")

    def at(self, name: str, revision: str, signed: bool) -> tuple[Repo, str]:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not signed):
            raise Refused(404 if signed else 401, "Repository not found", "RepoNotFound")
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return repo, sha

    def create(self, asked: dict) -> tuple[int, dict, bytes]:
        if (owner := asked.get("organization") or USER) != USER:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            return as_json(url | {"error": "You already created this model repo"}, 409)
        self.server.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return as_json(url)

    def model(self, name, action, rest, body, signed) -> tuple[int, dict, bytes]:
        if action == "branch":
            repo, sha = self.at(name, "main", signed)
            if rest in repo.branches:
                raise Refused(409, "Reference already exists")
            repo.branches[rest] = sha
            return as_json({})
        revision = rest if action in ("revision", "tree", "preupload", "commit", "paths-info") else "main"
        repo, sha = self.at(name, revision.split("/")[0] or "main", signed)
        files = repo.commits[sha]
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            return as_json({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})
        if action == "tree":
            return as_json([entry(path, *files[path]) for path in files])
        if action == "preupload":
            asked = json.loads(body)["files"]
            return as_json({"files": [self.mode(files, file["path"]) for file in asked]})
        if action == "commit":
            return self.commit(name, repo, revision, sha, [json.loads(line) for line in body.splitlines()])
        raise Refused(404, f"nothing at {action}", "EntryNotFound")

    def mode(self, files: dict, path: str) -> dict:
        large = self.server.lfs and path.endswith((".safetensors", ".bin", ".png"))
        oid = entry(path, *files[path])["oid"] if path in files else None
        lfs_oid = hashlib.sha256(files[path][0]).hexdigest() if path in files and files[path][1] else oid
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": lfs_oid}

    def batch(self, name: str, asked: dict) -> tuple[int, dict, bytes]:
        objects = []
        for wanted in asked["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                found["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(found)
        return as_json({"transfer": "basic", "objects": objects})

    def put(self, path: str, body: bytes) -> tuple[int, dict, bytes]:
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "content does not match its hash")
        self.server.blobs[oid] = body
        return as_json({})

    def commit(self, name: str, repo: Repo, revision: str, sha: str, lines: list) -> tuple[int, dict, bytes]:
        files, header = dict(repo.commits[sha]), lines[0]["value"]
        if header.get("parentCommit") not in (None, sha):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refused(400, f"LFS object {value['oid']} of {value['path']} has not arrived")
                files[value["path"]] = (self.server.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        new = hashlib.sha1(f"{sha}{header}{len(repo.commits)}".encode()).hexdigest()
        repo.commits[new], repo.branches[revision] = files, new
        return as_json({"success": True, "commitOid": new, "commitUrl": f"{self.server.url}/{name}/commit/{new}"})

    def resolve(self, repo: Repo, sha: str, path: str) -> tuple[int, dict, bytes]:
        if path not in repo.commits[sha]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content, large = repo.commits[sha][path]
        etag = hashlib.sha256(content).hexdigest() if large else entry(path, content, large)["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Content-Length": str(len(content))}
        return 200, headers, content


def entry(path: str, content: bytes, large: bool) -> dict:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": path, "size": len(content), "oid": oid}
    return found | (
        {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}} if large else {}
    )


def as_json(content, status: int = 200) -> tuple[int, dict, bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()
