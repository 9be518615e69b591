"""The folder of a training run: what it holds, and how nothing in it is ever half-written.

    out/settings.json          what the run is; another run is not mixed into it
    out/checkpoint-00000500/   everything to go on from step 500 as if nothing had happened
    out/model/                 the finished model and its tokenizer
    out/model-00000500/        the model as it was at step 500, where `keep_models` asks for it
    out/states/                of a lens: its base's states of the text, until the lens is finished
    out/history.csv            the history so far

Folders and files are written under another name and renamed once they are whole.
"""

import json
import logging
import shutil
from pathlib import Path

from accelerate.utils import DistributedType

from backpack_lib.files import write_text
from backpack_lib.training.config import TrainingConfig

# Accelerate warns at every save that the output embedding is the input embedding, as it should be.
logging.getLogger("accelerate.utils.other").addFilter(lambda record: "shared tensor" not in record.msg)


class RunFolder:
    """Reads and writes one run's folder."""

    def __init__(self, config: TrainingConfig):
        self.path = Path(config.out)
        self.settings = self.path / "settings.json"
        self.identity = config.identity()
        self.check(self.identity)

    def check(self, identity: dict):
        """Raises ValueError if the folder holds another run."""
        before = json.loads(self.settings.read_text(encoding="utf-8")) if self.settings.is_file() else identity
        changed = [
            f"{name}={before.get(name)!r}, not {value!r}"
            for name, value in identity.items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{str(self.path)!r} already holds a run with {', '.join(changed)}; "
                "choose another `out`, or resume that run as it began."
            )

    def claim(self, accelerator, text: str):
        """Notes what the run is, once all that it needs is there, so that a mistake leaves nothing behind.

        text: the fingerprint of its blocks. With other text or another number of processes, its steps would see
        other rows; and its checkpoints are of a whole model or of one that is divided among processes (FSDP).
        """
        divided = accelerator.distributed_type == DistributedType.FSDP
        identity = self.identity | {"text": text, "processes": accelerator.num_processes, "fsdp": divided}
        self.check(identity)
        if accelerator.is_main_process:
            write_text(self.settings, json.dumps(identity, indent=1))

    def save(self, accelerator, progress: dict):
        """Writes a checkpoint of all that `accelerator` prepared and of each process' progress, then drops older ones."""
        older = self.checkpoints()
        building = self.path / "checkpoint-building"
        if accelerator.is_main_process:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(building))
        write_text(building / f"progress-{accelerator.process_index}.json", json.dumps(progress))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            building.rename(self.path / f"checkpoint-{progress['step']:08d}")
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)

    def resume(self, accelerator) -> dict | None:
        """Restores what `save` wrote and returns its `progress`; None if there is no checkpoint."""
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        accelerator.load_state(str(checkpoints[-1]))
        return json.loads((checkpoints[-1] / f"progress-{accelerator.process_index}.json").read_text(encoding="utf-8"))

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-[0-9]*"))

    def finish(self):
        """Drops what only a run in progress needs."""
        for folder in (*self.path.glob("checkpoint-*"), self.path / "states"):
            shutil.rmtree(folder, ignore_errors=True)

    def write_model(self, name: str, accelerator, loss, tokenizer):
        """Writes a loss' model and its tokenizer as a folder that `load` reads."""
        weights = accelerator.get_state_dict(loss)  # gathered from all processes, if it is divided among them
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(loss).model
            weights = {key.removeprefix("model."): tensor for key, tensor in weights.items()}
            for tied in model.all_tied_weights_keys:
                weights.pop(tied, None)
            building = self.path / "model-building"
            shutil.rmtree(building, ignore_errors=True)
            model.save_pretrained(building, state_dict=weights)
            tokenizer.save_pretrained(building)
            shutil.rmtree(self.path / name, ignore_errors=True)
            building.rename(self.path / name)
        accelerator.wait_for_everyone()

    def write_history(self, history: list[dict]):
        import pandas as pd

        write_text(self.path / "history.csv", pd.DataFrame(history).to_csv(index=False))

    def history(self):
        """The history so far, a DataFrame with one row for each evaluation."""
        import pandas as pd

        return pd.read_csv(self.path / "history.csv")
