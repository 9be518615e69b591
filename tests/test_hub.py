"""With a network, models come from the hub by their names; without one, nothing hangs, warns or asks for it."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from helpers import ROOT, tiny_model, tiny_tokenizer

LOAD = "from backpack_lib import load; model, tokenizer = load({!r}); print(model.config.num_senses, len(tokenizer))"


def run(code, folder, **env):
    """Runs Python as a user would, without the settings that keep the tests themselves off the network."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_HOME")}
    env = kept | {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | env
    started = time.monotonic()
    made = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True)
    return made, time.monotonic() - started


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of the hub as a download needs: OWNER/NAME/resolve/main/FILE, with a commit and a tag."""

    def translate_path(self, path):
        return super().translate_path(path.split("?")[0].replace("/resolve/main/", "/"))

    def end_headers(self):
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
        super().end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub" / "somebody" / "tiny"
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "hub")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_model_comes_from_the_hub_by_its_name_and_afterwards_from_the_cache(hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    made, _ = run(LOAD.format("somebody/tiny"), tmp_path, HF_ENDPOINT=address)
    assert made.stdout.split() == ["3", "500"], made.stderr
    made, _ = run(LOAD.format("somebody/other"), tmp_path, HF_ENDPOINT=address)
    assert "ValueError: 'somebody/other' is no folder with a model, and none could be loaded" in made.stderr
    hub.shutdown()
    hub.server_close()
    made, _ = run(LOAD.format("somebody/tiny"), tmp_path, HF_ENDPOINT=address)
    assert made.stdout.split() == ["3", "500"] and not made.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "data set"])
def test_a_hub_that_does_not_answer_is_given_up_soon_and_in_one_sentence(what, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if what == "model":
            code = "load('somebody/tiny')"
        else:
            code = "open_corpus('somebody/texts')"
        code = (
            "from backpack_lib import load; from backpack_lib.text.corpora import open_corpus; import time\n"
            f"t = time.time()\ntry: {code}\nexcept ValueError as e: print(e)\nprint(time.time() - t)"
        )
        made, _ = run(code, tmp_path, HF_ENDPOINT=address)
    *message, seconds = made.stdout.splitlines()
    assert len(message) == 1 and "could be loaded by that name" in message[0]
    assert float(seconds) < 12 and not made.stderr, made.stderr
