"""A small server that speaks as much of the hub's HTTP API as huggingface_hub and datasets use, on this machine alone.

Repositories, accounts and what is to go wrong are set by the test; what was asked is in `requests`. Files that the hub
would keep in LFS (safetensors, and what is large) are answered with a redirect to another origin, as the hub's storage
is one, and come with their size and checksum in the headers of that redirect.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

LARGE = 10 * 2**20
OPEN_FILES = ("README.md", ".gitattributes")  # what a gated repository shows to everyone
REPOSITORY = r"(?P<id>[^/]+/[^/]+?)"
API = rf"/api/(?P<kind>model|dataset)s/{REPOSITORY}"


@dataclass
class Account:
    """Who a token belongs to: `role` is read, write or fineGrained; `scopes` are the owners a fine one may write to."""

    name: str = "alice"
    role: str = "write"
    organizations: Mapping[str, str] = field(default_factory=dict)  # to the role in it
    scopes: tuple[str, ...] = ()
    granted: tuple[str, ...] = ()  # gated repositories that let this account in

    def may_write(self, repository: str) -> bool:
        """Whether the token may write to a repository."""
        owner = repository.split("/")[0]
        member = owner == self.name or self.organizations.get(owner) in ("admin", "write")
        return member and (self.role == "write" or (self.role == "fineGrained" and owner in self.scopes))

    def described(self) -> dict[str, Any]:
        """What whoami says."""
        token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            entities = [{"entity": {"type": "user", "name": n}, "permissions": ["repo.write"]} for n in self.scopes]
            token["fineGrained"] = {"global": [], "scoped": entities}
        organizations = [{"name": name, "roleInOrg": role} for name, role in self.organizations.items()]
        return {"name": self.name, "orgs": organizations, "auth": {"type": "access_token", "accessToken": token}}


@dataclass
class Repository:
    """A repository: commits (name to content), and which commit a branch or tag is."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """The new commit's id; the branch is at it."""
        text = json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
        oid = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[oid], self.refs[branch] = dict(files), oid
        self.messages.append(message)
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        """What the main branch holds."""
        return self.commits[self.refs["main"]]


@dataclass
class Fault:
    """What goes wrong: requests that match are answered with `status`, or their body is cut after `cut` bytes."""

    method: str
    path: str
    times: int
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    text: str = "on purpose"
    cut: int = -1
    size: int = -1  # what a file's headers claim for its size


class HubServer:
    """The server, running while the context lasts. `endpoint` is what HF_ENDPOINT is to be."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.renamed: dict[str, str] = {}
        self.accounts: dict[str, Account] = {"hf_alice": Account()}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.objects: dict[str, bytes] = {}
        self.page = 1000
        self.lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: Mapping[str, bytes] | Path, kind: str = "model", **words: Any) -> Repository:
        """A new repository with one commit: files by name, or those of a folder."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        made = self.repositories[kind, name] = Repository(**words)
        made.commit(dict(files))
        return made

    def fail(self, method: str, path: str, times: int = 10**6, **how: Any) -> Fault:
        """Let the next requests of a method whose path matches a regex go wrong; see Fault."""
        self.faults.append(Fault(method, path, times, **how))
        return self.faults[-1]

    def asked(self, method: str, path: str) -> list[dict[str, str]]:
        """The headers of every request of a method whose path matches a regex."""
        with self.lock:
            return [headers for m, p, headers in self.requests if m == method and re.search(path, p)]

    def fault(self, method: str, path: str, aspect: str) -> Fault | None:
        """The fault that this request meets now, counted down; aspect: status, cut or size."""
        with self.lock:
            for fault in self.faults:
                usable = fault.times > 0 and fault.method == method and re.search(fault.path, path)
                if usable and getattr(fault, aspect) > (0 if aspect == "status" else -1):
                    fault.times -= 1
                    return fault
        return None


class RefusedError(Exception):
    """An answer that is an error, with the hub's own headers."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


def is_large(name: str, size: int) -> bool:
    """Whether a file goes to LFS."""
    return size >= LARGE or name.endswith((".safetensors", ".bin", ".parquet"))


def blob_id(content: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict[str, Any]:
    """What the listing of a folder says of a file."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    if is_large(name, len(content)):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class _Handler(BaseHTTPRequestHandler):
    """One request. A method of its own for each address in ROUTES."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "receive_commit"),
        ("POST", rf"/((?P<kind>dataset)s/)?{REPOSITORY}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "store"),
        ("POST", rf"/((?P<kind>dataset)s/)?{REPOSITORY}\.git/info/lfs/objects/verify", "verify"),
        ("GET", rf"/((?P<kind>dataset)s/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
        ("GET", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<file>.+)", "fetch"),
    )

    def log_message(self, *_: object) -> None:
        """Say nothing on stderr."""

    def _handle(self) -> None:
        self.body = self._read()
        path = urlsplit(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        try:
            fault = self.hub.fault(self.command, path, "status")
            if fault is not None:
                raise RefusedError(fault.status, fault.text, **fault.headers)
            method = "GET" if self.command == "HEAD" else self.command
            for expected, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == expected:
                    words = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**words)
                    return
            raise RefusedError(404, f"no such address: {self.command} {path}")
        except RefusedError as refused:
            self._json({"error": refused.message}, refused.status, refused.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.hub.fault(self.command, urlsplit(self.path).path, "cut")
        self.wfile.write(body if fault is None else body[: fault.cut])
        if fault is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _account(self) -> Account | None:
        """The token's account, or None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.accounts[token] if token else None

    def _repository(self, kind: str, name: str) -> Repository:
        account = self._account()
        if name in self.hub.renamed:
            target = self.path.replace(name, self.hub.renamed[name], 1)
            raise RefusedError(307, "renamed", Location=target)
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and not (account and account.may_write(name))):
            raise RefusedError(404 if account else 401, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, kind: str, name: str) -> Repository:
        account, found = self._account(), self._repository(kind, name)
        if account is None:
            raise RefusedError(401, "Invalid username or password.")
        if not account.may_write(name):
            raise RefusedError(403, "You don't have the rights to write to this repository")
        return found

    def _commit(self, found: Repository, revision: str | None) -> str:
        oid = found.refs.get(revision or "main", revision or "")
        if oid not in found.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # What is asked of the account and of repositories

    def whoami(self) -> None:
        account = self._account()
        if account is None:
            raise RefusedError(401, "Invalid username or password.")
        self._json(account.described())

    def create(self) -> None:
        asked, account = json.loads(self.body), self._account()
        if account is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        if not account.may_write(name):
            raise RefusedError(403, f"You don't have the rights to create a model under {name.split('/')[0]}")
        kind = asked.get("type", "model")
        if (kind, name) in self.hub.repositories:
            raise RefusedError(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, private=private)
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": "0"})

    def validate(self) -> None:
        """Hold a model card's front matter against what the hub demands of the fields that this project writes."""
        parts = json.loads(self.body)["content"].split("---\n")
        problems = []
        try:
            front = yaml.safe_load(parts[1]) if parts[0] == "" and len(parts) > 2 else {}
        except yaml.YAMLError as error:
            front, problems = {}, [str(error)]
        base = front.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            problems.append(f'"base_model" with value "{base}" is not valid. Use a model id from the hub')
        if front.get("base_model_relation", "quantized") not in ("quantized", "finetune", "adapter", "merge"):
            problems.append('"base_model_relation" is none of the known ones')
        tags = front.get("tags", [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            problems.append('"tags" must be a list of strings')
        license_ = front.get("license", "mit")
        if license_ not in ("mit", "apache-2.0", "llama3.1", "other", "psfl"):
            problems.append(f'"license" must be one of the known ones, not {license_!r}')
        said = {"errors": [{"message": problem} for problem in problems], "warnings": []}
        self._json(said, 400 if problems else 200)

    def info(self, kind: str, id: str, revision: str | None = None) -> None:  # noqa: A002
        found = self._repository(kind, id)
        oid = self._commit(found, revision)
        with_sizes = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = []
        for name, content in found.commits[oid].items():
            entry: dict[str, Any] = {"rfilename": name}
            if with_sizes:
                entry |= {"size": len(content), "blobId": blob_id(content)}
                lfs = described(name, content).get("lfs")
                if lfs is not None:
                    entry["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 134}
            siblings.append(entry)
        self._json(
            {"id": id, "sha": oid, "private": found.private, "gated": "manual" if found.gated else False}
            | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
        )

    def auth_check(self, kind: str, id: str, write: str | None = None) -> None:  # noqa: A002
        (self._writable if write else self._repository)(kind, id)
        self._json({})

    def tree(self, kind: str, id: str, revision: str, folder: str = "") -> None:  # noqa: A002
        found = self._repository(kind, id)
        files = found.commits[self._commit(found, revision)]
        inside = {n: c for n, c in files.items() if not folder or n.startswith(folder + "/")}
        if folder and not inside:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        depth = folder.count("/") + 1 if folder else 0
        entries = _folders(inside, None if recursive else folder)
        entries += [described(name, inside[name]) for name in inside if recursive or name.count("/") == depth]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page < len(entries):
            rest = "&".join(f"{k}={v[0]}" for k, v in query.items() if k != "cursor")
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.endpoint}{path}?{rest}&cursor={start + self.hub.page}>; rel="next"'
        self._json(entries[start : start + self.hub.page], headers=headers)

    def paths_info(self, kind: str, id: str, revision: str) -> None:  # noqa: A002
        found = self._repository(kind, id)
        files = found.commits[self._commit(found, revision)]
        asked = parse_qs(self.body.decode())["paths"]
        entries = [described(path, files[path]) for path in asked if path in files]
        entries += [e for path in asked for e in _folders(files, None) if e["path"] == path]
        self._json(entries)

    # Files that are fetched

    def resolve(self, id: str, revision: str, file: str, kind: str = "model") -> None:  # noqa: A002
        found = self._repository(kind, id)
        account, oid = self._account(), self._commit(found, revision)
        if found.gated and file not in OPEN_FILES and not (account and id in account.granted):
            message = f"Access to model {id} is restricted."
            raise RefusedError(403 if account else 401, message, "GatedRepo")
        if file not in found.commits[oid]:
            raise RefusedError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=oid)
        content = found.commits[oid][file]
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        fault = self.hub.fault(self.command, urlsplit(self.path).path, "size")
        size = str(len(content) if fault is None else fault.size)
        if not is_large(file, len(content)):
            wrong = {} if fault is None else {"X-Linked-Size": size}
            self._ranged(content, headers | wrong | {"ETag": f'"{blob_id(content)}"'})
            return
        checksum = hashlib.sha256(content).hexdigest()
        self.hub.objects[checksum] = content
        headers |= {"X-Linked-Size": size, "X-Linked-ETag": f'"{checksum}"', "ETag": f'"{blob_id(content)}"'}
        self._send(302, b"", headers | {"Location": f"{self.hub.storage}/storage/{checksum}/{quote(file)}?signed=1"})

    def fetch(self, oid: str, file: str) -> None:
        if "Authorization" in self.headers:
            raise RefusedError(400, "a token left the hub")
        self._ranged(self.hub.objects[oid], {"ETag": f'"{oid}"', "X-File": file})

    def _ranged(self, content: bytes, headers: Mapping[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self._send(200, content, headers)
            return
        first, last = match.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            raise RefusedError(416, "no such range", Content_Range=f"bytes */{len(content)}")
        self._send(206, content[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})

    # Files that are sent

    def preupload(self, kind: str, id: str, revision: str) -> None:  # noqa: A002
        found = self._writable(kind, id)
        here = found.commits[self._commit(found, revision)]
        modes = []
        for file in json.loads(self.body)["files"]:
            name, large = file["path"], is_large(file["path"], file["size"])
            entry = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if name in here:
                entry["oid"] = hashlib.sha256(here[name]).hexdigest() if large else blob_id(here[name])
            modes.append(entry)
        self._json({"files": modes})

    def batch(self, id: str, kind: str = "model") -> None:  # noqa: A002
        self._writable(kind, id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage}/storage/{asked['oid']}?signed=1"}
                verify = {"href": f"{self.hub.endpoint}/{id}.git/info/lfs/objects/verify"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise RefusedError(400, "a token left the hub")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, "the checksum is not that of the content")
        self.hub.objects[oid] = self.body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def verify(self, id: str, kind: str = "model") -> None:  # noqa: A002
        self._writable(kind, id)
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, "not uploaded")
        self._json({})

    def receive_commit(self, kind: str, id: str, revision: str) -> None:  # noqa: A002
        found = self._writable(kind, id)
        files = dict(found.commits[self._commit(found, revision)])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusedError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = found.commit(files, revision, message)
        self._json({"commitUrl": f"{self.hub.endpoint}/{id}/commit/{oid}", "commitOid": oid, "success": True})


def _folders(files: Mapping[str, bytes], above: str | None) -> list[dict[str, Any]]:
    """The folders among files: all of them, or those directly in one folder."""
    found = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    if above is not None:
        found = {name for name in found if str(Path(name).parent) == (above or ".")}
    return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(found)]
