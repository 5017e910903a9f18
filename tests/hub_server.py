"""A stand-in of the Hugging Face hub on this machine: the endpoints that its client uses to push and to pull.

It keeps commits in memory: each is all files of the repository, by path. Large files come by git LFS, as the hub takes
them without xet. What it was asked is in `asked`, with the bodies.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, OWNER = "hf_" + "Standin0" * 4, "someone"
LARGE = (".safetensors", ".png")  # what goes by LFS
REPO = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
FILE = r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """private: whether it takes the owner's token to see it. commits: [(id, {path: content})], the newest last."""

    def __init__(self, private: bool):
        self.private = private
        self.commits = [("0" * 40, {".gitattributes": b"*.safetensors filter=lfs\n"})]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a branch, or of the beginning of an id; None where there is none."""
        if revision == "main":
            return self.commits[-1]
        return next((each for each in self.commits if each[0].startswith(revision)), None)


class Hub:
    """What the stand-in knows. repos: by "models/OWNER/NAME". large: contents by their SHA-256. fault: a status that
    every request whose path matches the pattern gets; damaged: paths whose downloads are cut."""

    def __init__(self):
        self.repos: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, bytes, str | None]] = []
        self.fault: tuple[str, int] | None = None
        self.damaged: set[str] = set()
        self.url = ""

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[name].at(revision)[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.asked.append((self.command, path, body, token))
        if self.hub.fault and re.search(self.hub.fault[0], path):
            self.answer(self.hub.fault[1], {"error": "fault"})
            return
        if token not in (None, TOKEN):
            self.answer(401, {"error": "x"}, X_Error_Message="Invalid credentials in Authorization header")
            return
        for method, pattern, act in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                act(self, body, token, **found.groupdict())
                return
        self.answer(404, {"error": f"no such endpoint: {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def seen(self, name: str, token: str | None) -> Repository | None:
        """The repository, where the token may see it; else it answers as if there were none."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and token is None):
            self.refuse(401 if token is None else 404, "RepoNotFound")
            return None
        return found

    def whoami(self, body, token) -> None:
        if token is None:
            self.refuse(401, "Unauthorized")
            return
        self.answer(
            200, {"type": "user", "name": OWNER, "fullname": OWNER, "orgs": [], "auth": {"type": "access_token"}}
        )

    def create(self, body, token) -> None:
        asked = json.loads(body)
        owner, kind = asked.get("organization") or OWNER, f"{asked.get('type') or 'model'}s"
        if owner != OWNER:
            self.answer(403, {"error": "not yours"})
            return
        name = f"{kind}/{owner}/{asked['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.repos:
            self.answer(409, {"url": url, "error": "You already created this repo"})
            return
        self.hub.repos[name] = Repository(asked.get("private") is True or asked.get("visibility") == "private")
        self.answer(200, {"url": url, "name": f"{owner}/{asked['name']}", "id": "0"})

    def validate(self, body, token) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body, token, kind, repo, revision) -> None:
        if (found := self.seen(f"{kind}/{repo}", token)) is None:
            return
        files, there = [], found.at(revision)[1]
        for each in json.loads(body)["files"]:
            large, content = each["path"].endswith(LARGE), there.get(each["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else git_hash(content)
            mode = "lfs" if large else "regular"
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, body, token, data, repo) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/large/{each['oid']}", "header": {}}}
            known = each["oid"] in self.hub.large
            objects.append({"oid": each["oid"], "size": each["size"], **({} if known else {"actions": action})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, token, oid) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer(200)

    def commit(self, body, token, kind, repo, revision) -> None:
        if (found := self.seen(f"{kind}/{repo}", token)) is None:
            return
        files = dict(found.at(revision)[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(f"{len(found.commits)} {sorted(files)}".encode()).hexdigest()
        found.commits.append((commit, files))
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"})

    def info(self, body, token, kind, repo, revision="main") -> None:
        if (found := self.seen(f"{kind}/{repo}", token)) is None:
            return
        if (at := found.at(revision)) is None:
            self.refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in at[1]]
        facts = {"id": repo, "modelId": repo, "sha": at[0], "private": found.private, "siblings": siblings}
        self.answer(200, {**facts, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body, token, kind, repo, revision) -> None:
        if (found := self.seen(f"{kind}/{repo}", token)) is None:
            return
        entries = []
        for path, content in sorted(found.at(revision)[1].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        assert parse_qs(urlsplit(self.path).query)["recursive"] == ["true"]
        self.answer(200, entries)

    def resolve(self, body, token, data, repo, revision, path) -> None:
        if (found := self.seen(f"{'datasets' if data else 'models'}/{repo}", token)) is None:
            return
        if (at := found.at(revision)) is None:
            self.refuse(404, "RevisionNotFound")
            return
        if path not in at[1]:
            self.refuse(404, "EntryNotFound")
            return
        content = at[1][path]
        digest = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_hash(content)
        if path in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.answer(200, content, ETag=f'"{digest}"', X_Repo_Commit=at[0], X_Linked_Size=str(len(content)))


ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", f"/api/{REPO}", Handler.info),
    ("GET", f"/api/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("HEAD", FILE, Handler.resolve),
    ("GET", FILE, Handler.resolve),
)


@contextmanager
def serving_hub():
    """A stand-in that answers as long as this is open."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
