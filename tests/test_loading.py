"""Devices, baselines and files by name. (What cannot be loaded is among the bad inputs; the hub has a file of its own.)"""

import pytest
from helpers import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from backpack_lib import SenseEdits, files, load, loading
from backpack_lib.loading import export, fingerprint, load_baseline, pick_device
from backpack_lib.text.corpora import find_files


@pytest.fixture
def save(tmp_path, tokenizer):
    def save(name, model):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_devices_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    for here, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda here=here: here)
        assert pick_device("auto").type == chosen  # an Apple GPU only if it is asked for
    assert pick_device("mps").type == "mps"
    for name in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ValueError, match=f"device='{name}' is no device .*; choose one of auto, cpu, mps"):
            pick_device(name)


def test_a_notebook_finds_files_where_the_command_line_does(tmp_path, save, tokenizer, monkeypatch):
    """A notebook runs in the folder it lies in, a command in the one above."""
    model = tiny_model(vocab_size=len(tokenizer))
    save("runs/mine/model", model)
    for folder in ("texts", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts" / "one.txt").write_text("One.")
    monkeypatch.delenv("BACKPACK_RUNS", raising=False)
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "site" / "backpack_lib")  # as a wheel installs it
    for place in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(place)
        assert files.runs_folder() == tmp_path / "runs"
        loaded, its_tokenizer = load("runs/mine/model")
        assert fingerprint(loaded) == fingerprint(model)
        assert [path.resolve() for path in find_files("texts/*.txt")] == [tmp_path / "texts" / "one.txt"]
        SenseEdits(loaded, its_tokenizer).save(tmp_path / "mine.safetensors")
        assert not len(SenseEdits.load("mine.safetensors", loaded, its_tokenizer))
    for name in ("texts", "runs"):  # what lies nearer goes first
        (tmp_path / "notebooks" / name).mkdir()
    assert find_files("texts") == [] and files.as_seen("runs") == "runs" and files.as_seen("") == ""


def test_the_baseline_of_a_model_is_known_or_named_and_reads_the_same_tokens(save, tokenizer):
    sizes = dict(vocab_size=len(tokenizer), n_positions=24, n_embd=20, n_layer=2, n_head=2)
    mine, transformer = save("mine", tiny_model(**sizes)), save("transformer", GPT2LMHeadModel(GPT2Config(**sizes)))
    unknown, why_not = load_baseline(mine)
    assert unknown is None and why_not.startswith(f"No Transformer that belongs to {mine!r} is known; name one")
    assert load_baseline("demo", "none")[0] is None
    for name, given, expected in ((mine, transformer, transformer), ("demo", "", "demo-transformer")):
        baseline, why_not = load_baseline(name, given)
        assert why_not == "" and fingerprint(baseline) == fingerprint(load(expected)[0])
    with pytest.raises(ValueError, match="reads other tokens than"):
        load_baseline(mine, "demo-transformer")
    with pytest.raises(ValueError, match="the model given is a Backpack"):
        load_baseline(mine, mine)


def test_the_baseline_of_the_released_model_is_gpt2(monkeypatch):
    def load(name, device):
        raise ValueError(f"no network for {name}")

    monkeypatch.setattr(loading, "load", load)
    why_not = load_baseline("stanfordnlp/backpack-gpt2")[1]
    assert why_not.endswith("is not to be had: no network for openai-community/gpt2")


def test_what_is_exported_is_the_model_in_half_precision(tmp_path, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer))
    expected = fingerprint(model.half())
    export(tmp_path / "exported", model, tokenizer)
    loaded, its_tokenizer = load(tmp_path / "exported", dtype="auto")
    assert fingerprint(loaded) == expected and its_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert [folder.name for folder in tmp_path.iterdir()] == ["exported"]
