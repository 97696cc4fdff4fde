"""Data sets of the hub, served by a small server on this machine: no network, no stand-in."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet
import pytest

COMMIT = "c0ffee" * 6 + "c0ff"


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [{"text": f"row {i}"} for i in range(8)]
REPOSITORIES = {
    "me/split": {
        "data/train-00000.parquet": parquet(ROWS[:5]),
        "data/test-00000.parquet": parquet(ROWS[5:]),
    },
    "me/files": {"a.jsonl": lines(ROWS[:3]), "more/b.jsonl": lines(ROWS[3:])},
    "me/named": {
        "README.md": b"---\nconfigs:\n- config_name: small\n  data_files: s.jsonl\n"
        b"- config_name: large\n  data_files: l.jsonl\n---\n",
        "s.jsonl": lines(ROWS[:2]),
        "l.jsonl": lines(ROWS),
    },
    "me/code": {"code.py": b"raise SystemExit('ran')", "a.jsonl": lines(ROWS)},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that reading a data set needs."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(body=True, asked=asked)

    def answer(self, body, asked=""):
        path = self.path.partition("?")[0]
        name = re.search(r"/me/[a-z]+", path)
        files = REPOSITORIES.get(name[0][1:]) if name else None
        status, headers, content = 200, {}, b""
        if files is None or ("/revision/" in path and not re.search(rf"main|{COMMIT}", path)):
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        elif "/paths-info/" in path:
            wanted = urllib.parse.parse_qs(asked).get("paths", [])
            wanted = wanted or json.loads(asked).get("paths", [])
            content = json.dumps([e for e in entries(files) if e["path"] in wanted]).encode()
        elif "/tree/" in path:
            folder = re.sub(r".*/tree/[^/]+/?", "", path)
            below = [e for e in entries(files) if e["path"].startswith(folder and f"{folder}/")]
            if "recursive=true" not in self.path.lower():
                depth = folder.count("/") + 1 if folder else 0
                below = [e for e in below if e["path"].count("/") == depth]
            content = json.dumps(below).encode()
        elif path.startswith("/api/"):
            siblings = [{"rfilename": each} for each in files]
            content = json.dumps({"id": name[0][1:], "sha": COMMIT, "siblings": siblings}).encode()
        elif (file := re.sub(r".*/resolve/[^/]+/", "", path)) in files:
            content = files[file]
            headers = {"ETag": f'"{sha(content)}"', "X-Repo-Commit": COMMIT}
            headers["Accept-Ranges"] = "bytes"
        else:
            status, headers = 404, {"X-Error-Code": "EntryNotFound"}
        if (part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and content:
            stop = int(part[2]) + 1 if part[2] else len(content)
            headers["Content-Range"] = f"bytes {part[1]}-{stop - 1}/{len(content)}"
            status, content = 206, content[int(part[1]) : stop]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def entries(files):
    """The files of a repository and the folders they are in."""
    folders = {str(each) for name in files for each in PurePosixPath(name).parents} - {"."}
    found = [{"type": "directory", "path": name, "oid": sha(b"")} for name in sorted(folders)]
    return found + [
        {"type": "file", "path": name, "size": len(content), "oid": sha(content)}
        for name, content in files.items()
    ]


def sha(content):
    return hashlib.sha1(content).hexdigest()


READ = """
import json, sys
from jaxlora.core.errors import UserError
from jaxlora.data.sources import digest, rows
from jaxlora.data.spec import DatasetSpec
answers = []
for settings in json.loads(sys.argv[1]):
    spec = DatasetSpec(type="completion", **settings)
    try:
        answers.append([[row["text"] for _, row in rows(spec)], digest(spec)])
    except UserError as error:
        answers.append([str(error), ""])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """``read(settings, ...)``: rows and digest of each, by one process that sees only our hub."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = str(tmp_path_factory.mktemp("hf"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": home}

    def read(*settings):
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(settings)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    yield read
    server.shutdown()


def test_splits_slices_files_names_and_streams_of_the_hub(read):
    cases = [
        ({"path": "me/split"}, range(5)),
        ({"path": "me/split", "split": "test"}, range(5, 8)),
        ({"path": "me/split", "split": "train[1:3]"}, range(1, 3)),
        ({"path": "me/split", "split": "train[-40%:]"}, range(3, 5)),
        ({"path": "me/split", "shards": 2, "shards_idx": 1}, range(1, 5, 2)),
        ({"path": "me/split", "streaming": True, "split": "train[:2]"}, range(2)),
        ({"path": "me/files"}, range(8)),
        ({"path": "me/files", "data_files": "a.jsonl"}, range(3)),
        ({"path": "me/files", "data_files": ["a.jsonl", "more/*.jsonl"]}, range(8)),
        ({"path": "me/files", "revision": COMMIT}, range(8)),
        ({"path": "me/named", "name": "small"}, range(2)),
    ]
    answers = read(*[settings for settings, _ in cases])
    for (settings, expected), (found, digest) in zip(cases, answers, strict=True):
        assert found == [f"row {i}" for i in expected], settings
        assert digest.startswith("hub:")


def test_what_the_hub_has_not_is_one_line_and_code_is_not_run(read):
    names = ({"path": "me/nothing"}, {"path": "me/split", "split": "dev"}, {"path": "me/code"})
    answers = read(*names)
    for text, _ in answers:
        assert text.startswith("datasets: me/")
        assert "\n" not in text
    assert "scripts are no longer supported" in answers[2][0]
