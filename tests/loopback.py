"""A stand-in for the Hugging Face Hub on the loopback interface: what the unmodified huggingface_hub client asks of it,
without xet (HF_HUB_DISABLE_XET=1). It keeps repositories with branches and commits in memory, checks the sha256 of what
it is given, and can be told to be unwell. It imitates the real service as its client sees it, no more.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Unwell(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class LoopbackHub:
    """hub.url, hub.start(), hub.stop(); what it has is in hub.repos, what it was asked in hub.asked."""

    def __init__(self):
        self.blobs: dict[str, bytes] = {}  # by sha256
        self.repos: dict[
            str, dict
        ] = {}  # {"private": bool, "branches": {name: commit}, "commits": {id: {path: sha256}}}
        self.tokens = {"hf_good": "me", "hf_reader": None}  # None: may read, not write
        self.asked: list[tuple[str, str]] = []
        self.lock, self.server, self.port = threading.RLock(), None, 0
        self.connections: set[socket.socket] = set()
        self.full = False  # no room for large files
        self.delay = 0.0  # seconds before each answer
        self.break_uploads = 0  # so many uploads end in the middle
        self.lose_answers = 0  # so many commits are made, and their answer is lost
        self.fail_commits = 0  # so many commits are refused
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # of connections that break off
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more; start() comes back with everything."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo]
        return {path: self.blobs[digest] for path, digest in repo["commits"][repo["branches"][branch]].items()}

    def branches(self, repo: str) -> set[str]:
        return set(self.repos[repo]["branches"])

    def uploads(self) -> list[str]:
        return [path for method, path in self.asked if method == "PUT"]

    def uploads_of(self, repo: str) -> list[str]:
        """Paths of all files that any commit of a repository has."""
        commits = self.repos[repo]["commits"].values() if repo in self.repos else ()
        return [path for files in commits for path in files]

    def commit(self, repo: dict, branch: str, files: dict[str, str]) -> str:
        parent = repo["branches"].get(branch, "")
        text = json.dumps([parent, len(repo["commits"]), sorted(files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        repo["commits"][commit] = files
        repo["branches"][branch] = commit
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        with suppress(ConnectionError):
            super().finish()

    def log_message(self, *_):
        pass

    # ------------------------------------------------------------------------------------------------- plumbing

    def handle_any(self):
        url = urlsplit(self.path)
        self.parts, self.query = [unquote(part) for part in url.path.strip("/").split("/")], parse_qs(url.query)
        self.hub.asked.append((self.command, unquote(url.path)))
        threading.Event().wait(self.hub.delay)
        if self.command == "PUT" and self.hub.break_uploads:
            self.hub.break_uploads -= 1
            self.rfile.read(min(1000, int(self.headers["Content-Length"]) // 2))
            return self.hang_up()
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        try:
            with self.hub.lock:
                self.route()
        except Unwell as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self.answer({"error": error.message}, error.status, headers | {"X-Error-Message": error.message})
        except (ConnectionError, BrokenPipeError):
            pass

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def answer(self, content=None, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def json(self):
        return json.loads(self.body or b"{}")

    def route(self) -> None:
        """Paths of the Hub's interface."""
        method, parts = self.command, self.parts
        if method == "PUT" and parts[0] == "storage":  # the address is signed: no token
            return self.store(parts[1])
        if parts == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Unwell(401, "Invalid credentials in Authorization header")
        self.user, self.token = self.hub.tokens.get(token), token
        if parts == ["api", "whoami-v2"]:
            return self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {}})
        if parts == ["api", "repos", "create"]:
            return self.create()
        if parts[:2] == ["api", "models"]:
            repo, rest = self.repo("/".join(parts[2:4])), parts[4:]
            what = rest[0] if rest else "revision"
            return getattr(self, f"do_{what}")(repo, rest[1] if len(rest) > 1 else "main", "/".join(rest[2:]))
        if parts[1].endswith(".git") and parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(self.repo(f"{parts[0]}/{parts[1].removesuffix('.git')}"))
        if parts[1].endswith(".git") and parts[2:4] == ["verify", "lfs"]:
            return self.answer({})
        if parts[2] == "resolve":
            return self.resolve(self.repo("/".join(parts[:2])), parts[3], "/".join(parts[4:]))
        raise Unwell(404, f"no {self.path}")

    def repo(self, name: str) -> dict:
        repo = self.hub.repos.get(name)
        if repo is None or repo["private"] and not self.token:
            raise Unwell(404 if self.token else 401, "Repository not found", "RepoNotFound")
        self.name = name
        return repo

    def files(self, repo: dict, revision: str) -> tuple[str, dict[str, str]]:
        commit = repo["branches"].get(revision, revision)
        if commit not in repo["commits"]:
            raise Unwell(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo["commits"][commit]

    def may_write(self) -> None:
        if self.user is None:
            raise Unwell(403, "Forbidden: the token has no write permission")

    # -------------------------------------------------------------------------------------------- repositories

    def create(self) -> None:
        self.may_write()
        asked = self.json()
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if name in self.hub.repos:
            raise Unwell(409, "You already created this model repo")
        repo = self.hub.repos[name] = {"branches": {}, "commits": {}}
        repo["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.commit(repo, "main", {})
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def do_revision(self, repo: dict, revision: str, _) -> None:
        commit, files = self.files(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        self.answer({"id": self.name, "modelId": self.name, "sha": commit, "siblings": siblings, "tags": []})

    def do_refs(self, repo: dict, *_) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repo["branches"].items()
        ]
        self.answer({"branches": branches, "converts": [], "tags": []})

    def do_branch(self, repo: dict, branch: str, _) -> None:
        self.may_write()
        if re.search(r"\.\.|//|[ ~^:?*\[\\]|\.lock$|^refs/|^-", branch):
            raise Unwell(400, f"Invalid reference for a branch: {branch}")
        if self.command == "DELETE":
            if branch == "main" or branch not in repo["branches"]:
                raise Unwell(404, f"no branch {branch}")
            del repo["branches"][branch]
            return self.answer({})
        if branch in repo["branches"]:
            raise Unwell(409, f"Reference already exists: {branch}")
        repo["branches"][branch] = self.files(repo, self.json().get("startingPoint", "main"))[0]
        self.answer({})

    def do_tree(self, repo: dict, revision: str, folder: str) -> None:
        _, files = self.files(repo, revision)
        inside = {path: digest for path, digest in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Unwell(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        folders = {path.rsplit("/", i)[0] for path in inside for i in range(1, path.count("/") + 1)}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        for path, digest in sorted(inside.items()):
            data = self.hub.blobs[digest]
            entry = {"type": "file", "oid": self.blob_id(data), "size": len(data), "path": path}
            if self.is_large(path):
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    # ------------------------------------------------------------------------------------------------- uploads

    def is_large(self, path: str) -> bool:
        return not path.endswith((".json", ".md", ".csv", "SHA256SUMS"))

    def blob_id(self, data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def do_preupload(self, repo: dict, revision: str, _) -> None:
        self.may_write()
        _, files = self.files(repo, revision)
        answers = []
        for file in self.json()["files"]:
            mode = "lfs" if self.is_large(file["path"]) and file["size"] else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if digest := files.get(file["path"]):
                answer["oid"] = digest if mode == "lfs" else self.blob_id(self.hub.blobs[digest])
            answers.append(answer)
        self.answer({"files": answers})

    def batch(self, repo: dict) -> None:
        self.may_write()
        if self.hub.full:
            raise Unwell(403, "Private repository storage limit reached")
        objects = []
        for wanted in self.json()["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}", "header": {}}}
                found["actions"]["verify"] = {"href": f"{self.hub.url}/{self.name}.git/verify/lfs", "header": {}}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Unwell(400, f"the content is not that of {oid}")
        self.hub.blobs[oid] = self.body
        self.answer({})

    def do_commit(self, repo: dict, branch: str, _) -> None:
        self.may_write()
        if self.hub.fail_commits:
            self.hub.fail_commits -= 1
            raise Unwell(503, "the Hub is being maintained")
        commit, files = self.files(repo, branch)
        if branch not in repo["branches"]:
            raise Unwell(404, f"no branch {branch}", "RevisionNotFound")
        files = dict(files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit", commit) != commit:
                raise Unwell(412, "A commit has happened since. Please refresh and try again.")
            if key == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = hashlib.sha256(data).hexdigest()
                self.hub.blobs[files[value["path"]]] = data
            if key == "lfsFile":
                if len(self.hub.blobs.get(value["oid"], b"")) != value["size"]:
                    raise Unwell(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = value["oid"]
            if key == "deletedFile" and files.pop(value["path"], None) is None:
                raise Unwell(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = self.hub.commit(repo, branch, files)
        if self.hub.lose_answers:
            self.hub.lose_answers -= 1
            return self.hang_up()
        self.answer({"commitUrl": f"{self.hub.url}/{self.name}/commit/{commit}", "commitOid": commit, "success": True})

    def resolve(self, repo: dict, revision: str, path: str) -> None:
        commit, files = self.files(repo, revision)
        if path not in files:
            raise Unwell(404, f"no {path}", "EntryNotFound")
        data = self.hub.blobs[files[path]]
        etag = files[path] if self.is_large(path) else self.blob_id(data)
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(data)),
        }
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            data, status = data[int(asked[1]) :], 206
        self.answer(data, status, headers | {"X-Linked-Etag": f'"{etag}"'})
