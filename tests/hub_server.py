"""A Hub on the loopback interface: enough of its HTTP interface to push a repository and to load it again."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


REPOSITORY = r"(?P<repo>[^/]+/[^/]+)"


class Hub(ThreadingHTTPServer):
    """Repositories in memory, one branch each.

    Attributes:
        files (`dict[str, dict[str, bytes]]`): repository id to path to content.
        private (`set[str]`): repositories that were created private.
        requests (`list[str]`): every request, as `"POST /api/repos/create"`, with its query.
        refuse_commits (`bool`): answer commits with an error, as a Hub that is out of order.
        refuse_objects (`bool`): fail half-way: large files are not taken.
        large_from (`int`): bytes from which files go through LFS.
        token (`str`, *optional*): the only one that may write.
        taken (`set[str]`): names that datasets have.
        branches (`list[str]`): created, as `"repository branch"`.
        objects (`dict[str, bytes]`): LFS objects by SHA-256.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.private, self.requests, self.refuse_commits = {}, set(), [], False
        self.refuse_objects, self.large_from, self.token = False, 2**20, None
        self.branches, self.objects, self.taken = [], {}, set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.respond(send_body=False)

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def do_PUT(self):
        self.respond()

    def respond(self, send_body=True):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {unquote(self.path)}")
        content = {"error": "no permission to write"}
        status, headers = self.refused(), {}
        if not status:
            status, headers, content = 404, {}, {"error": f"no route for {path}"}
            for pattern, answer in ROUTES:
                if match := re.fullmatch(pattern, path):
                    status, headers, content = answer(self.server, body, **match.groupdict())
                    break
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(content)

    def refused(self):
        """The status of a write that is not allowed: nobody said who it is from, or somebody who may not."""
        if self.command != "POST" or self.server.token is None or "validate-yaml" in self.path:
            return None
        given = self.headers.get("authorization")
        return None if given == f"Bearer {self.server.token}" else 401 if given is None else 403

    def log_message(self, *_):
        pass


def create(hub, body):
    values = json.loads(body)
    repo = f"{values.get('organization') or 'tester'}/{values['name']}"
    if repo in hub.taken:
        return 409, {}, {"error": "the name is taken", "url": f"{hub.url}/datasets/{repo}"}
    known = repo in hub.files
    hub.files.setdefault(repo, {})
    # What the client says depends on its version.
    if values.get("private") or values.get("visibility") == "private":
        hub.private.add(repo)
    return 409 if known else 200, {}, {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}


def preupload(hub, body, repo, revision):
    answers = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] >= hub.large_from else "regular",
            "shouldIgnore": False,
            "oid": None,
        }
        for file in json.loads(body)["files"]
    ]
    return 200, {}, {"files": answers}


def lfs_batch(hub, body, repo):
    """Where to send the objects of large files."""
    objects = [
        {**each, "actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}", "header": {}}}}
        for each in json.loads(body)["objects"]
    ]
    return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": objects}


def lfs_object(hub, body, oid):
    if hub.refuse_objects:
        return 403, {}, {"error": "the quota is used up"}
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    return 200, {}, {}


def branch(hub, body, repo, name):
    hub.branches.append(f"{repo} {name}")
    return 200, {}, {}


def commit(hub, body, repo, revision):
    if hub.refuse_commits:
        return 503, {}, {"error": "out of order"}
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        if entry["key"] == "lfsFile":
            hub.files[repo][entry["value"]["path"]] = hub.objects[entry["value"]["oid"]]
    oid = oid_of(hub, repo)
    urls = {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "pullRequestUrl": f"{hub.url}/{repo}/discussions/1"}
    return 200, {}, {**urls, "commitOid": oid}


def resolve(hub, body, repo, revision, path):
    if path not in hub.files.get(repo, {}):
        missing = "EntryNotFound" if repo in hub.files else "RepoNotFound"
        return 404, {"X-Error-Code": missing, "X-Repo-Commit": oid_of(hub, repo)}, {"error": missing}
    content = hub.files[repo][path]
    return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": oid_of(hub, repo)}, content


def information(hub, body, repo, revision=None):
    if repo not in hub.files:
        return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "RepoNotFound"}
    siblings = [{"rfilename": path} for path in hub.files[repo]]
    return 200, {}, {"id": repo, "sha": oid_of(hub, repo), "private": repo in hub.private, "siblings": siblings}


def tree(hub, body, repo, revision, path=""):
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in hub.files.get(repo, {}).items()
        if name.startswith(path)
    ]
    return 200, {}, entries


def oid_of(hub, repo):
    """A commit id that changes with the content."""
    return hashlib.sha1(repr(sorted(hub.files.get(repo, {}).items())).encode()).hexdigest()


ROUTES = [
    (r"/api/repos/create", create),
    (r"/api/validate-yaml", lambda hub, body: (200, {}, {"errors": [], "warnings": []})),
    (r"/api/whoami-v2", lambda hub, body: (200, {}, {"name": "tester", "orgs": [], "type": "user"})),
    (rf"/{REPOSITORY}\.git/info/lfs/objects/batch", lfs_batch),
    (r"/objects/(?P<oid>[0-9a-f]+)", lfs_object),
    (rf"/api/models/{REPOSITORY}/branch/(?P<name>.+)", branch),
    (rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)", preupload),
    (rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)", commit),
    (rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)/?(?P<path>.*)", tree),
    (rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", information),
    (rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


@contextmanager
def running():
    """Serve a [`Hub`] from a thread while the context is open."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
