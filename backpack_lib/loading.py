"""Models and tokenizers by name: those shipped with the suite, folders, and the Hugging Face hub."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import GPT2LMHeadModel, PreTrainedConfig
from transformers.utils import logging

from backpack_lib.files import as_seen, data_folder, first_line, let_others_read, project_folder, runs_folder
from backpack_lib.hub import local_first
from backpack_lib.model.backpack import GPT2_TOKENS, BackpackLMHeadModel, from_released_format
from backpack_lib.model.kinds import require_transformer, suppress_unused_rows
from backpack_lib.text.corpora import PLANTED
from backpack_lib.text.tokenizers import load_tokenizer

DEVICES = ("auto", "cpu", "cuda", "mps")
SHIPPED = {"demo": "demo/backpack", "demo-transformer": "demo/transformer"}
TRAINED = {"planted": "backpack", "planted-transformer": "transformer"}  # by the notebook 01_training, or shipped
MODELS = {"backpack": BackpackLMHeadModel, "gpt2": GPT2LMHeadModel}
GPT2 = "openai-community/gpt2"
NONE = "none"  # as the name of a baseline


def load(name, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """A model in evaluation mode, and its tokenizer.

    name: "demo" or "demo-transformer" (shipped with the suite); "planted" or "planted-transformer" (the
        last that 01_training trained on planted text, or, before it has, those shipped); a folder that
        training or `save_pretrained` wrote; or a hub id such as "stanfordnlp/backpack-gpt2".
    device: see `pick_device`.

    Raises ValueError if there is no such model or device, if it is neither a Backpack nor a GPT-2, or if
    its files are damaged or incomplete.
    """
    device = pick_device(device)
    model, tokenizer = load_model(name, dtype).to(device), load_tokenizer_of(name)
    if model.config.vocab_size > len(tokenizer):
        model.config.used_vocab_size = len(tokenizer)
        suppress_unused_rows(model)
    return model, tokenizer


def load_tokenizer_of(name):
    """The tokenizer of a model alone; see `load`."""
    try:
        return load_tokenizer(_path_of(name))
    except ValueError:
        # The released model uses GPT-2's tokenizer without carrying a copy of it.
        if not _is_released_format(_config(name)):
            raise
        return load_tokenizer(GPT2)


def load_model(name, dtype: torch.dtype = torch.float32, **changes):
    """The model alone; see `load`. changes: settings of its configuration to override, such as `resid_pdrop`."""
    kind = from_released_format(_config(name)).get("model_type")
    if kind not in MODELS:
        raise ValueError(f"{str(name)!r} holds a model of type {kind!r}; this suite reads {' and '.join(MODELS)}.")
    try:
        with no_progress_bar():
            settings = {"dtype": dtype, "output_loading_info": True} | changes
            model, info = local_first(MODELS[kind].from_pretrained, _path_of(name), **settings)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"The weights in {str(name)!r} are missing or damaged: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The weights in {str(name)!r} lack {len(missing)} of the model's tensors, such as {missing[0]}."
        )
    model.loss_type = "ForCausalLM"
    return model.eval()


def load_baseline(name, given: str = "", device: str | torch.device = "cpu"):
    """The Transformer that a Backpack is compared with, or None, and a sentence that says why there is none.

    name: the Backpack's. given: the Transformer's, "none", or "" for the one that belongs to the Backpack: of what
        training wrote, the newest beside it with the same tokenizer and the same trunk; of other models with
        GPT-2's vocabulary, such as the released Backpack, GPT-2 small.

    Raises ValueError if the one that was named is no Transformer or reads other tokens than the Backpack.
    """
    found = given or _baseline_of(name)
    if found in (None, NONE):
        return None, f"No Transformer that belongs to {str(name)!r} is known; name one by the parameter `baseline`."
    try:
        model, tokenizer = load(found, device)
    except ValueError as error:
        if given:
            raise
        return None, f"The Transformer that belongs to {str(name)!r} is not to be had: {error}"
    require_transformer(model)
    own = load_tokenizer_of(name)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"baseline={given!r} reads other tokens than {str(name)!r} "
            f"({len(tokenizer):,} and {len(own):,} in all), so the two cannot be compared; "
            f"name a Transformer with the same tokenizer, or {NONE!r}."
        )
    return model, ""


def _baseline_of(name) -> str | None:
    folder = Path(_path_of(name))
    beside = [*folder.parent.glob("*"), *folder.parent.parent.glob("*/model")] if folder.is_dir() else []
    fitting = [other for other in beside if _is_baseline(other, folder)]
    if fitting:
        return str(max(fitting, key=lambda other: (other / "config.json").stat().st_mtime))
    return GPT2 if len(load_tokenizer_of(name)) == GPT2_TOKENS else None


def _is_baseline(other: Path, folder: Path) -> bool:
    """Whether a folder holds a Transformer with the same tokenizer and trunk as the Backpack in another."""
    files = [of / name for of in (folder, other) for name in ("config.json", "tokenizer.json")]
    if not all(file.is_file() for file in files):
        return False
    own, tokens, its, its_tokens = (file.read_bytes() for file in files)
    own, its = json.loads(own), from_released_format(json.loads(its))
    same = all(own.get(size) == its.get(size) for size in ("n_embd", "n_layer", "n_positions"))
    return its.get("model_type") == "gpt2" and same and tokens == its_tokens


def is_planted(name) -> bool:
    """Whether a model was trained on planted text alone, as the settings beside its folder say."""
    file = Path(_path_of(name)).parent / "settings.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    return settings.get("corpus") == PLANTED and not settings.get("init_from")


def _path_of(name) -> str:
    if name in TRAINED:
        return _last_planted(TRAINED[name])
    return str(data_folder() / SHIPPED[name]) if name in SHIPPED else as_seen(str(name))


def _last_planted(architecture: str) -> str:
    made = (runs_folder() / "01_training").glob(f"{architecture}-*/model")
    made = sorted((folder for folder in made if is_planted(folder)), key=lambda folder: folder.stat().st_mtime)
    return str(made[-1] if made else data_folder() / PLANTED / architecture)


def _config(name) -> dict:
    path = _path_of(name)
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"The folder {str(name)!r} holds no model (no config.json).")
    if not Path(path).exists() and len(Path(path).parts) > 2:  # too long for an id of the hub
        raise ValueError(
            f"There is no folder {str(name)!r} here, nor in {str(project_folder())!r}; give a model's folder."
        )
    try:
        return local_first(PreTrainedConfig.get_config_dict, path)[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name)!r} is no folder with a model, and none could be loaded by that name: {first_line(error)}"
        ) from error


def _is_released_format(config: dict) -> bool:
    return from_released_format(config) is not config


@contextmanager
def no_progress_bar():
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name. "auto": a CUDA GPU where there is one, else the CPU.

    An Apple GPU ("mps") has to be asked for, since it rounds otherwise and gives slightly other results.

    Raises ValueError for an unknown name, and for a device that is not here.
    """
    if str(name).split(":")[0] not in DEVICES:
        raise ValueError(f"device={name!r} is unknown; choose one of {', '.join(DEVICES)}.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} needs a CUDA GPU, and there is none here; choose 'cpu' or 'auto'.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r} needs an Apple GPU, and there is none here; choose 'cpu' or 'auto'.")
    return device


def export(run: Path, target: Path, also: Iterable[str] = ()):
    """Copies a finished run's model in half precision, its tokenizer, and other files of the run by name.

    Each file is there whole or not.
    """
    model, tokenizer = load(run / "model")
    with tempfile.TemporaryDirectory(dir=target.parent) as building, no_progress_bar():
        model.half().save_pretrained(building)
        tokenizer.save_pretrained(building)
        for name in also:
            shutil.copy(run / name, building)
        let_others_read(Path(building))
        target.mkdir(exist_ok=True)
        for file in Path(building).iterdir():
            file.replace(target / file.name)


def fingerprint(model) -> str:
    """A model's weights in twelve letters: other weights have others."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:12]
