"""Model folders to the hub, against a server of our own that speaks as much of its protocol as an upload needs."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from compvis_checkpoints import random_checkpoint
from tiny import ldm

from ldmcli.core.errors import InputError, UsageError
from ldmcli.formats import hub


class Hub(BaseHTTPRequestHandler):
    """Remembers what was created and committed; refuses those who do not say who they are."""

    def log_message(self, *args):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.server.refuse:
            return self.answer({"error": "Invalid credentials"}, 401)
        return self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuse:
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path.endswith("/create"):
            asked = json.loads(body)
            self.server.created.append(asked["name"])
            return self.answer({"url": f"{self.server.address}/me/{asked['name']}", "name": f"me/{asked['name']}"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{self.server.address}/me/model/commit/{'1' * 40}"
            return self.answer({"success": True, "commitUrl": address, "commitOid": "1" * 40})
        return self.answer({})


@pytest.fixture
def server(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files, server.refuse = [], {}, False
    server.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "model"
    (out / "unet").mkdir(parents=True)
    (out / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# model\n")
    (out / "unet" / "config.json").write_text("{}")
    (out / ".secret").write_text("token")
    (tmp_path / "elsewhere").write_text("private")
    (out / "link").symlink_to(tmp_path / "elsewhere")
    return out


def test_a_folder_arrives_whole_and_without_hidden_files_or_links(server, folder):
    address = hub.push(folder, "me/model", endpoint=server.address)
    assert server.created == ["model"] and address == f"{server.address}/me/model"
    assert server.files == {"README.md": (folder / "README.md").read_bytes(), "unet/config.json": b"{}"}


def test_refusals_and_silence_end_with_a_line_and_show_no_token(server, folder):
    server.refuse = True
    with pytest.raises(InputError, match="hf auth login") as found:
        hub.push(folder, "me/model", endpoint=server.address)
    assert "hf_of_a_test" not in str(found.value) and "\n" not in str(found.value)
    with pytest.raises(InputError, match="could not be uploaded"):
        hub.push(folder, "me/model", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["a/b/c", "../x", "", "-x", "a b", "https://x/y"])
def test_names_that_are_none(name, folder):
    with pytest.raises(UsageError, match="OWNER/NAME"):
        hub.push(folder, name)


def test_an_empty_folder_is_not_pushed(tmp_path):
    with pytest.raises(UsageError, match="nothing in it"):
        hub.push(tmp_path, "me/model")


def test_the_command_converts_and_pushes(server, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    path = random_checkpoint(tmp_path / "theirs", "class")
    ending = ldm("convert", path, tmp_path / "run", "--push-to", "me/model", "--json")
    assert ending.json["pushed_to"] == f"{server.address}/me/model"
    assert {"README.md", "config.toml", "model.safetensors", "stats.json"} <= set(server.files)
    assert server.files["README.md"].startswith(b"---\n")


def test_a_file_is_not_pushed(tmp_path):
    path = random_checkpoint(tmp_path / "theirs", "class")
    assert ldm("convert", path, tmp_path / "run").code == 0
    ending = ldm("convert", tmp_path / "run", tmp_path / "out.ckpt", "--to", "compvis", "--push-to", "me/model")
    assert ending.code == 2 and "--push-to" in ending.line
