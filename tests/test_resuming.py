"""Training promises: the same result however often it is interrupted or shared, and nothing half-written."""

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from helpers import RESULTS, ROOT, assert_same_weights, command, run_command, stop_before, weights

from backpack_lib import load, train
from backpack_lib.files import locked_folder
from backpack_lib.training.checkpoints import RunFolder


def run_until_killed(config, after_step, launcher=()):
    """Kills a run and all its processes as soon as it has a checkpoint of at least that step."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = psutil.Popen(command(config, launcher), cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        names = os.listdir(config.out) if os.path.isdir(config.out) else []
        if any(re.fullmatch(r"checkpoint-\d+", name) and int(name[11:]) >= after_step for name in names):
            processes = [process, *process.children(recursive=True)]
            for one in processes:
                one.kill()
            psutil.wait_procs(processes)
        time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL and not (Path(config.out) / "model").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_weights(tiny):
    config = replace(tiny, steps=60, save_every=4, eval_every=7, accumulate=2)
    whole = replace(config, out=config.out + "-whole")
    assert run_command(whole).returncode == 0
    for after_step in (4, 28):
        run_until_killed(config, after_step)
    assert run_command(config).returncode == 0
    assert_same_weights(config.out, whole.out)
    a, b = (pd.read_csv(f"{c.out}/history.csv")[RESULTS] for c in (config, whole))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_what_a_kill_leaves_behind_does_not_matter(tiny, monkeypatch):
    """Half a checkpoint, half a model, an old checkpoint not yet deleted."""
    whole = replace(tiny, out=tiny.out + "-whole")
    train(whole)
    stop_before(monkeypatch, tiny, step=8)
    for name in ("checkpoint-building", "model-building", "checkpoint-00000002"):
        os.makedirs(f"{tiny.out}/{name}")
        open(f"{tiny.out}/{name}/model.safetensors", "wb").write(b"half")
    train(tiny)
    assert_same_weights(tiny.out, whole.out)
    assert sorted(os.listdir(tiny.out)) == [".lock", "history.csv", "model", "settings.json"]


def test_models_on_the_way_can_be_kept_and_change_nothing(tiny):
    config = replace(tiny, save_every=4, keep_models=True)
    train(config)
    train(replace(config, out=f"{config.out}-plain", keep_models=False))
    assert_same_weights(config.out, f"{config.out}-plain")
    kept = [load(f"{config.out}/model-{step:08d}")[0].lm_head.weight for step in (4, 8, 12)]
    last = load(f"{config.out}/model")[0].lm_head.weight
    assert [torch.equal(weight, last) for weight in kept] == [False, False, True]


# ---------------------------------------------------------------- one run a folder


def test_a_finished_run_is_not_run_again_and_another_is_not_mixed_into_it(tiny, monkeypatch):
    history = train(tiny)
    monkeypatch.setattr("backpack_lib.training.run.Run", None)
    pd.testing.assert_frame_equal(train(tiny), history)
    train(replace(tiny, save_every=5, device="cpu"))  # how it is run does not matter
    with pytest.raises(ValueError, match=r"already holds a run with learning_rate=0.01, not 0.02; choose another"):
        train(replace(tiny, learning_rate=0.02))


def test_two_trainings_do_not_share_a_folder(tiny):
    with locked_folder(Path(tiny.out)):
        with pytest.raises(ValueError, match="Another run is writing to"):
            train(tiny)
    assert len(train(tiny))


def test_changed_text_and_another_number_of_processes_are_refused(tiny, monkeypatch, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(Path(tiny.corpus).read_text(encoding="utf-8"))
    config = replace(tiny, corpus=str(file))
    stop_before(monkeypatch, config, step=8)
    text = re.search('"text": "(.*)"', Path(config.out, "settings.json").read_text(encoding="utf-8"))[1]
    for processes, kind, words in ((2, "MULTI_CPU", "processes=1, not 2"), (1, "FSDP", "fsdp=False, not True")):
        accelerator = SimpleNamespace(num_processes=processes, distributed_type=kind, is_main_process=True)
        with pytest.raises(ValueError, match=f"already holds a run with {words}; choose another `out`"):
            RunFolder(config).claim(accelerator, text)
    file.write_text(file.read_text(encoding="utf-8") + "\n\nMore text.")
    with pytest.raises(ValueError, match="already holds a run with text="):
        train(config)


def test_the_precision_that_auto_picks_belongs_to_the_run_and_is_not_emulated(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = replace(tiny, precision="auto", device="auto")
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
        assert config.identity()["precision"] == precision
    assert replace(config, device="cpu").identity()["precision"] == "fp32"


# ---------------------------------------------------------------- several processes


def launcher(kind, port):
    file = ROOT / "data" / "launch" / f"{kind}.yaml"
    place = ["--num_processes=2", f"--main_process_port={port}"]
    return ["-m", "accelerate.commands.launch", f"--config_file={file}", *place]


@pytest.mark.slow
@pytest.mark.parametrize("kind, port", [("ddp", 29617), ("fsdp", 29620)])
def test_two_processes_give_the_losses_of_one(tiny, kind, port):
    tiny = replace(tiny, dropout=0.0, device="cpu", accumulate=2, eval_blocks=7)
    one, two = (replace(tiny, out=f"{tiny.out}-{n}", batch_size=4 // n) for n in (1, 2))
    train(one)
    result = run_command(two, launcher(kind, port))
    assert result.returncode == 0, result.stderr
    a, b = (pd.read_csv(f"{config.out}/history.csv") for config in (one, two))
    np.testing.assert_allclose(a[RESULTS], b[RESULTS], atol=1e-4)
    a, b = (weights(config.out) for config in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("kind, port, streaming", [("ddp", 29621, True), ("fsdp", 29631, False)])
def test_two_processes_that_are_killed_end_with_the_same_weights(tiny, kind, port, streaming):
    config = replace(tiny, device="cpu", steps=30, streaming=streaming)
    whole = replace(config, out=f"{tiny.out}-whole")
    result = run_command(whole, launcher(kind, port))
    assert result.returncode == 0, result.stderr
    run_until_killed(config, 4, launcher(kind, port + 1))
    result = run_command(config, launcher(kind, port + 2))
    assert result.returncode == 0, result.stderr
    assert_same_weights(config.out, whole.out)


def test_muon_on_a_divided_model_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="optimizer='muon' needs whole matrices, which FSDP divides"):
        train(replace(tiny, optimizer="muon"))
