"""`LatentCodec.push_to_hub` through huggingface_hub, to a server on this machine that answers as the hub does."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from test_codec import kl

from latent_codec import LatentCodec
from latent_codec.previews.fitting import fit_linear
from latent_codec.previews.preview_files import StoredPreview, preview_path, write_preview


@pytest.fixture
def hub(monkeypatch):
    """The hub's four endpoints for small files; the files that were committed, by repository and path."""
    committed: dict[str, bytes] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Authorization"] == "Bearer hf_mine"
            if self.path == "/api/repos/create":
                self.answer({"url": f"{url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif self.path.endswith("/preupload/main"):
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            elif self.path.endswith("/commit/main"):
                repository = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        committed[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
                self.answer(
                    {"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/{repository}/commit/1"}
                )
            else:
                self.send_error(404)

        def do_GET(self):
            self.send_error(404)

        def answer(self, value):
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield committed
    server.shutdown()
    server.server_close()


def test_a_codec_goes_to_the_hub_with_its_preview_and_a_card(hub, tmp_path):
    LatentCodec(kl()).save_pretrained(tmp_path / "mine")
    codec = LatentCodec.from_pretrained(tmp_path / "mine")
    fit = fit_linear(codec)
    preview = StoredPreview(weight=fit.weight, bias=fit.bias, palette=None, tiny=None)
    write_preview(preview_path(tmp_path / "mine"), codec, preview)

    url = codec.push_to_hub("me/mine", token="hf_mine")

    assert url.endswith("me/mine/commit/1")
    names = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "preview.safetensors"}
    assert hub.keys() == {f"me/mine/{name}" for name in names}
    assert 'LatentCodec.from_pretrained("me/mine")' in hub["me/mine/README.md"].decode()
    (tmp_path / "again").mkdir()
    for name in names:
        (tmp_path / "again" / name).write_bytes(hub[f"me/mine/{name}"])
    assert LatentCodec.from_pretrained(tmp_path / "again").fingerprint == codec.fingerprint
