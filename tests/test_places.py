"""Where people work: odd folder names, data that cannot be written, no network; stopped, and at once."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pandas as pd
import pytest
from helpers import ROOT, Interruptible

COMMAND = [sys.executable, "-m", "backpack_lib.running"]
AT_ONCE = {  # folders of several runs at the same time, two of them of one notebook
    "runs/00_tour": "00_tour",
    "runs/zwei te": "00_tour -p word king",
}


def environment(**changes):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("BACKPACK_")}
    return kept | {key: str(value) for key, value in changes.items()}


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
    env = environment(HOME=tmp_path / "home", PYTHONPATH=clone, PYTHONDONTWRITEBYTECODE=1)
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "IPYTHONDIR"):
        env.pop(name, None)
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


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_to_the_same_result(tmp_path):
    sizes = "n_layer 1, n_head 2, n_embd 16, num_senses 2, block_size 32, batch_size 4, warmup 5, strict False"
    often = "steps 600, eval_every 100, save_every 20, eval_blocks 4, finetune_steps 2"
    settings = [part for setting in f"{sizes}, {often}".split(", ") for part in ("-p", *setting.split())]
    line = [*COMMAND, "01_training", *settings]
    found = {}
    for name in ("whole", "interrupted"):
        env = environment(BACKPACK_RUNS=tmp_path / name, BACKPACK_CACHE=tmp_path / "cache", PYTHONPATH=ROOT)
        if name == "interrupted":
            run = Interruptible(line, env=env)
            while not list((tmp_path / name).glob("01_training/backpack-*/checkpoint-[0-9]*")):
                assert run.poll() is None
                time.sleep(0.05)
            err = run.interrupt()
            assert run.returncode == 130 and "The same line resumes: training from its last checkpoint" in err
            assert "Traceback" not in err, err
            assert not (tmp_path / name / "01_training" / "results.json").exists()
        again = subprocess.run(line, env=env, capture_output=True, text=True)
        assert again.returncode == 0, again.stdout + again.stderr
        table = pd.read_csv(tmp_path / name / "01_training" / "backpack.csv")
        found[name] = table[["step", "train_loss", "valid_loss"]]
    pd.testing.assert_frame_equal(found["whole"], found["interrupted"])
