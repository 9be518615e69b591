"""Training promises: the same result however often it is interrupted or shared, and nothing half-written."""

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import RESULTS, ROOT, assert_same_weights, command, run_command, weights

from backpack_lib import load, train
from backpack_lib.files import locked_folder
from backpack_lib.training.checkpoints import RunFolder

# ---------------------------------------------------------------- interruptions


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lens_of": "planted-transformer", "dropout": 0.0}], ids=["backpack", "lens"])
def test_killed_at_any_moment_it_ends_with_the_same_weights(tiny, changes):
    config = replace(tiny, **changes, steps=60, save_every=4, eval_every=7, accumulate=2)
    whole = replace(config, out=config.out + "-whole")
    assert run_command(whole).returncode == 0

    rng = np.random.default_rng(0)
    kills = 0
    for after_step in (4, 28, 48):
        process = subprocess.Popen(
            command(config), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            names = [name for name in os.listdir(config.out)] if os.path.isdir(config.out) else []
            if any(re.fullmatch(r"checkpoint-\d+", name) and int(name[11:]) >= after_step for name in names):
                time.sleep(rng.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
            time.sleep(0.001)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    assert run_command(config).returncode == 0
    assert_same_weights(config.out, whole.out)
    a, b = (pd.read_csv(f"{c.out}/history.csv")[RESULTS] for c in (config, whole))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_what_a_kill_leaves_behind_does_not_matter(tiny, monkeypatch):
    """Half a checkpoint, half a model, an old checkpoint not yet deleted."""
    whole = replace(tiny, out=tiny.out + "-whole")
    train(whole)

    from backpack_lib.training.checkpoints import RunFolder

    monkeypatch.setattr(RunFolder, "write_model", lambda *args: None)
    monkeypatch.setattr(RunFolder, "finish", lambda *args: None)
    train(tiny)
    monkeypatch.undo()
    for name in ("checkpoint-building", "model-building", "checkpoint-00000002"):
        os.makedirs(f"{tiny.out}/{name}")
        open(f"{tiny.out}/{name}/model.safetensors", "wb").write(b"half")
    train(tiny)
    assert_same_weights(tiny.out, whole.out)
    assert sorted(os.listdir(tiny.out)) == [".lock", "history.csv", "model", "settings.json"]


def test_two_trainings_do_not_share_a_folder(tiny):
    config = replace(tiny)
    with locked_folder(Path(config.out)):
        with pytest.raises(ValueError, match="Another run is writing to"):
            train(config)
    assert len(train(config))


@pytest.mark.parametrize("native", [True, False])
def test_the_precision_that_auto_picks_belongs_to_the_run_and_is_not_emulated(native, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    config = replace(tiny, precision="auto", device="auto")
    assert config.identity()["precision"] == ("bf16" if native else "fp32")
    assert replace(config, device="cpu").identity()["precision"] == "fp32"
    if native:
        Path(config.out).mkdir()
        RunFolder(config).claim()
        with pytest.raises(ValueError, match="precision='bf16', not 'fp32'"):
            RunFolder(replace(config, device="cpu"))


def test_models_on_the_way_can_be_kept_and_change_nothing(tiny):
    config = replace(tiny, steps=12, save_every=4, keep_models=True)
    train(config)
    train(replace(config, out=f"{config.out}-plain", keep_models=False))
    assert_same_weights(config.out, f"{config.out}-plain")
    kept = sorted(path.name for path in Path(config.out).glob("model-*"))
    assert kept == ["model-00000004", "model-00000008", "model-00000012"]
    four, twelve = (load(f"{config.out}/model-{step:08d}")[0].state_dict() for step in (4, 12))
    assert all(
        torch.equal(tensor, twelve[name]) for name, tensor in load(f"{config.out}/model")[0].state_dict().items()
    )
    assert any(not torch.equal(tensor, twelve[name]) for name, tensor in four.items())


def test_a_finished_run_is_not_run_again(tiny, monkeypatch):
    history = train(tiny)
    monkeypatch.setattr("backpack_lib.training.run.Run", None)
    pd.testing.assert_frame_equal(train(tiny), history)


def test_another_run_is_not_mixed_into_a_folder(tiny, text):
    train(tiny)
    with pytest.raises(ValueError, match=r"already holds a run with learning_rate=0.01, not 0.02; choose another"):
        train(replace(tiny, learning_rate=0.02))
    train(replace(tiny, save_every=5, device="cpu"))  # how it is run does not matter


def test_changed_text_is_not_mixed_into_a_run(tiny, monkeypatch, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(open(tiny.corpus, encoding="utf-8").read())
    config = replace(tiny, corpus=str(file))
    from backpack_lib.training.checkpoints import RunFolder

    monkeypatch.setattr(RunFolder, "write_model", lambda *args: None)
    monkeypatch.setattr(RunFolder, "finish", lambda *args: None)  # as if killed just before
    train(config)
    monkeypatch.undo()
    file.write_text(open(tiny.corpus, encoding="utf-8").read() + "\n\nMore text.")
    with pytest.raises(ValueError, match="holds a run with text="):
        train(config)


# ---------------------------------------------------------------- several processes


def launcher(kind, port):
    file = ROOT / "data" / "launch" / f"{kind}.yaml"
    place = ["--num_processes=2", f"--main_process_port={port}"]
    return ["-m", "accelerate.commands.launch", f"--config_file={file}", *place]


@pytest.mark.slow
@pytest.mark.parametrize("kind, port", [("ddp", 29617), ("fsdp", 29620)])
def test_two_processes_give_the_losses_of_one_and_leave_their_group(tiny, tmp_path, kind, port):
    tiny = replace(tiny, dropout=0.0, device="cpu", accumulate=2, eval_blocks=7)
    one, two = (replace(tiny, out=f"{tiny.out}-{n}", batch_size=4 // n) for n in (1, 2))
    train(one)
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, torch\nfrom backpack_lib.training.__main__ import main\n"
        "said = f'status {main()}, group open: {torch.distributed.is_initialized()}'\n"
        "pathlib.Path(__file__).with_name(os.environ['RANK'] + '.said').write_text(said)\n"
    )
    result = run_command(two, launcher(kind, port), [str(script)])
    assert result.returncode == 0, result.stderr
    assert [file.read_text() for file in tmp_path.glob("*.said")] == ["status 0, group open: False"] * 2
    a, b = (pd.read_csv(f"{config.out}/history.csv") for config in (one, two))
    np.testing.assert_allclose(a[RESULTS], b[RESULTS], atol=1e-4)
    a, b = (weights(config.out) for config in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


@pytest.mark.slow
def test_a_divided_model_goes_on_from_its_checkpoint(tiny):
    config = replace(tiny, dropout=0.0, device="cpu", out=f"{tiny.out}-whole")
    broken = replace(config, out=f"{tiny.out}-broken", steps=40)
    result = run_command(replace(config, steps=40), launcher("fsdp", 29621))
    assert result.returncode == 0, result.stderr
    process = subprocess.Popen(
        command(broken, launcher("fsdp", 29622)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while process.poll() is None and not list(Path(broken.out).glob("checkpoint-*[02468]")):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert not (Path(broken.out) / "model").exists()
    with pytest.raises(ValueError, match=r"model was divided among processes \(FSDP\), as it is not now"):
        train(broken)
    result = run_command(broken, launcher("fsdp", 29623))
    assert result.returncode == 0, result.stderr
    assert_same_weights(broken.out, config.out)


def test_muon_on_a_divided_model_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="optimizer='muon' needs whole matrices, which FSDP divides"):
        train(replace(tiny, optimizer="muon"))
