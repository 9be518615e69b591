"""Where people work: odd folder names, data that cannot be written, no network, two runs at once."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from helpers import ROOT

COMMAND = [sys.executable, "-m", "backpack_lib.running"]
AT_ONCE = {  # folders of several runs at the same time, two of them of one notebook
    "runs/00_tour": "00_tour",
    "runs/zwei te": "00_tour -p word king",
}


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_clone_in_a_foreign_folder_with_data_that_is_only_read_and_no_network(tmp_path):
    clone = tmp_path / "Müllers Ordner 背包" / "clone"
    left_out = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, clone, ignore=left_out)
    for path in [clone / "data", *(clone / "data").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = contents(clone / "data")
    (tmp_path / "home").mkdir()
    own = ("BACKPACK_", "HF_", "XDG_", "MPLCONFIGDIR", "IPYTHONDIR")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    env |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(clone), "PYTHONDONTWRITEBYTECODE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # whoever asks for the network calls here
        proxy.settimeout(0.5)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        env |= {name: address for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")}
        runs = [
            subprocess.Popen(
                [*COMMAND, *line.split(), "-p", "out", folder], cwd=clone, env=env, stdout=-1, stderr=-1, text=True
            )
            for folder, line in AT_ONCE.items()
        ]
        for run, folder in zip(runs, AT_ONCE):
            out, err = run.communicate(timeout=600)
            assert run.returncode == 0, out + err
            assert "warn" not in err.lower()
            results = json.loads((clone / folder / "results.json").read_text())
            assert results["headline"] and ("00_tour" not in AT_ONCE[folder] or results["rounding"] < 1e-3)
        with pytest.raises(TimeoutError):
            proxy.accept()
    assert contents(clone / "data") == before
    for path in [clone / "data", *(clone / "data").rglob("*")]:
        path.chmod(0o755)
