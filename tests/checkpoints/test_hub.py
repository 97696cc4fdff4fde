import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from jaxlora.checkpoints.hub import resolve
from jaxlora.core.errors import UserError

COMMIT = "c0ffee" * 6 + "c0ff"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ x }}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/params.json": b"{}",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs."""

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        path = self.path.partition("?")[0]
        content, headers, status = b"", {}, 200
        if "gated" in path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif "/broken/" in path:
            status = 500
        elif "/me/tiny" not in path:
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        elif "other-branch" in path:
            status, headers = 404, {"X-Error-Code": "RevisionNotFound"}
        elif "/tree/" in path:
            content = json.dumps(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": sha(c)}
                    for n, c in FILES.items()
                ]
            ).encode()
        elif path.startswith("/api/"):
            info = {"id": "me/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
            content = json.dumps(info).encode()
        else:
            content = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
            headers = {"ETag": f'"{sha(content)}"', "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def sha(content):
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def fake_hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


RESOLVE = """
import json, sys
from jaxlora.checkpoints.hub import resolve
from jaxlora.core.errors import UserError
for name, revision in json.loads(sys.argv[1]):
    try:
        folder = resolve(name, revision)
        print(json.dumps(sorted(path.name for path in folder.rglob("*"))))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def resolve_in_a_process(cache, requests, endpoint=None):
    """The hub client reads its environment at import, so each setting needs its own process."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    environment = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "0" if endpoint else "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_ENDPOINT": endpoint} if endpoint else {}
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(requests)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_hub_id_is_downloaded_without_pickles_and_then_found_offline(tmp_path):
    with fake_hub() as endpoint:
        requests = [("me/tiny", None), ("me/tiny", "other-branch"), ("me/gated", None)]
        requests += [("me/absent", None)]
        names, branch, gated, absent = resolve_in_a_process(tmp_path, requests, endpoint)
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.model"]
    assert names == wanted
    assert branch == (
        "me/tiny at revision other-branch: the hub has no such revision; check its name."
    )
    assert "accept them at https://huggingface.co/me/gated and log in" in gated
    assert absent.startswith("me/absent: neither a folder here nor a repository on the hub")
    cached, offline = resolve_in_a_process(tmp_path, [("me/tiny", None), ("me/absent", None)])
    assert cached == wanted
    assert "not in the local cache, and the hub cannot be reached" in offline


def test_unreachable_hub_is_one_line(tmp_path):
    [message] = resolve_in_a_process(tmp_path, [("me/tiny", None)], "http://127.0.0.1:9")
    assert "the hub cannot be reached" in message
    assert "\n" not in message


def test_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("model").samefile(tmp_path / "model")
    assert resolve("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./model", "../model", "a/b/c", "~/x", "a b", ""]
)
def test_missing_folder_is_not_looked_up_on_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve(path)
    assert path in str(caught.value)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(UserError, match="is a file; expected the folder"):
        resolve(tmp_path / "model.safetensors")
