"""A Hugging Face Hub without a network: a download cache as huggingface_hub lays it out, and a server to upload to."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import httpx2


def fill_hub_cache(cache_dir: Path, repo_id: str, revisions: dict[str, Path]) -> dict[str, str]:
    """
    Put folders into a download cache as if they had been fetched.

    Args:
        cache_dir: What to pass as `cache_dir`, with `local_files_only=True`.
        repo_id: Such as `"org/draft"`.
        revisions: Branch or tag name -> folder with its files.

    Returns:
        Branch or tag name -> commit hash.
    """
    repository = cache_dir / f"models--{repo_id.replace('/', '--')}"
    commits = {}
    for name, folder in revisions.items():
        # Of the contents, as Transformers keeps the code of a commit that it has seen.
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        commits[name] = hashlib.sha1(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()
        shutil.copytree(folder, repository / "snapshots" / commits[name])
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commits[name])
    return commits


class HubServer:
    """
    The part of the Hub's API that an upload needs; set as huggingface_hub's transport. It knows one user, whose token
    is `hf_good`, and keeps what it is told.

    Attributes:
        private: Repository id -> whether it was made private.
        branches: (Repository id, branch) -> its files, path -> bytes. Pull requests are branches `refs/pr/N`.
        refuse: Path of an API call, as a regular expression -> status it is answered with.
        calls: Method and path of each call.
    """

    def __init__(self):
        self.private: dict[str, bool] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.refuse: dict[str, int] = {}
        self.calls: list[str] = []

    def client(self) -> httpx2.Client:
        return httpx2.Client(transport=httpx2.MockTransport(self.answer))

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.raw_path.decode().split("?")[0].removeprefix("/api/")
        self.calls.append(f"{request.method} {path}")
        for pattern, status in self.refuse.items():
            if re.fullmatch(pattern, path):
                return httpx2.Response(status, json={"error": "You may not do that."})
        if path == "validate-yaml":
            return httpx2.Response(200, json={"warnings": [], "errors": []})
        if request.headers.get("authorization") != "Bearer hf_good":
            return httpx2.Response(401, json={"error": "Who are you?"})
        if path == "whoami-v2":
            return httpx2.Response(200, json={"name": "org", "type": "user"})
        if path == "repos/create":
            return self.create(json.loads(request.content))
        model, action, revision = re.fullmatch(r"models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path).groups()
        if action is None:
            return httpx2.Response(200 if model in self.private else 404, json={"id": model})
        revision = unquote(revision)
        if (model, revision) not in self.branches:
            return httpx2.Response(404, headers={"x-error-code": "RevisionNotFound"}, json={"error": "no such branch"})
        if action == "tree":
            files = self.branches[model, revision]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
            return httpx2.Response(200, json=tree)
        if action == "preupload":
            files = json.loads(request.content)["files"]
            answers = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in files
            ]
            return httpx2.Response(200, json={"files": answers})
        assert action == "commit"
        return self.commit(model, revision, request)

    def create(self, body: dict) -> httpx2.Response:
        repo_id = f"{body['organization']}/{body['name']}"
        if repo_id in self.private:
            return httpx2.Response(409, json={"error": "exists", "url": f"https://huggingface.co/{repo_id}"})
        self.private[repo_id] = body.get("visibility") == "private"
        self.branches[repo_id, "main"] = {".gitattributes": b""}
        return httpx2.Response(200, json={"url": f"https://huggingface.co/{repo_id}"})

    def commit(self, model: str, revision: str, request: httpx2.Request) -> httpx2.Response:
        files = dict(self.branches[model, revision])
        for line in request.content.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.messages.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
            else:
                raise AssertionError(entry)
        pull_request = None
        if request.url.params.get("create_pr"):
            number = 1 + sum(branch.startswith("refs/pr/") for _, branch in self.branches)
            revision, pull_request = f"refs/pr/{number}", f"https://huggingface.co/{model}/discussions/{number}"
        self.branches[model, revision] = files
        oid = hashlib.sha1(request.content).hexdigest()
        return httpx2.Response(
            200,
            json={
                "commitUrl": f"https://huggingface.co/{model}/commit/{oid}",
                "commitOid": oid,
                "pullRequestUrl": pull_request,
            },
        )
