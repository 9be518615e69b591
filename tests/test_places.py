"""Where people work: odd folder names, data that cannot be written, no network, two runs at once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

RUNS = {"runs/00_tour": "00_tour", "runs/zwei te": "00_tour -p word king"}  # at the same time, of one notebook
OWN_VARIABLES = ("BACKPACK_", "HF_", "XDG_", "MPLCONFIGDIR", "IPYTHONDIR")


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_clone_in_a_foreign_folder_with_data_that_is_only_read_and_no_network(tmp_path):
    clone = tmp_path / "Müllers Ordner 背包" / "clone"
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, clone, ignore=left_out)
    for path in filter(Path.is_file, (clone / "data").rglob("*")):
        path.chmod(0o444)
    before = contents(clone / "data")
    (tmp_path / "home").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # whoever asks for the network calls here
        proxy.settimeout(0.5)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        env |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), address)
        started = {}
        for folder, line in RUNS.items():
            command = [sys.executable, "-m", "backpack_lib.running", *line.split(), "-p", "out", folder]
            started[folder] = subprocess.Popen(command, cwd=clone, env=env, stdout=-1, stderr=-1, text=True)
        for folder, run in started.items():
            out, err = run.communicate(timeout=600)
            assert run.returncode == 0 and "warn" not in err.lower(), out + err
            assert json.loads((clone / folder / "results.json").read_text())["rounding"] < 1e-3
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert contents(clone / "data") == before
