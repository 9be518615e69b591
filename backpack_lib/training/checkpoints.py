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
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import DistributedType

from backpack_lib.files import write_text
from backpack_lib.training.config import TrainingConfig


class RunFolder:
    """Reads and writes one run's folder. Raises ValueError if it holds another run."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.path = Path(config.out)
        self.settings = self.path / "settings.json"
        now = config.identity()
        before = json.loads(self.settings.read_text(encoding="utf-8")) if self.settings.is_file() else now
        changed = [
            f"{name}={before.get(name)!r}, not {now.get(name)!r}" for name in now if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{config.out!r} already holds a run with {', '.join(changed)}; "
                "choose another `out`, or the old settings to resume that run."
            )

    def claim(self):
        """Notes what the run is, once all that it needs has been found, so that a mistake leaves nothing behind."""
        write_text(self.settings, json.dumps(self.config.identity(), indent=1))

    def save(self, accelerator, progress: dict):
        """Writes a checkpoint of everything that `accelerator` prepared and of `progress`, then drops older ones.

        progress: plain numbers, strings, lists and dicts; `progress["step"]` names the checkpoint. Each
        process writes its own.
        """
        older = self.checkpoints()
        building = self.path / "checkpoint-building"
        if accelerator.is_main_process:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
        accelerator.wait_for_everyone()
        with no_warning_of_shared_weights():
            accelerator.save_state(str(building))
        write_text(building / f"progress-{accelerator.process_index}.json", json.dumps(progress))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            building.rename(self.path / f"checkpoint-{progress['step']:08d}")
            for folder in older:
                shutil.rmtree(folder, ignore_errors=True)
        accelerator.wait_for_everyone()

    def resume(self, accelerator) -> dict | None:
        """Restores what `save` wrote and returns its `progress`; None if there is no checkpoint.

        Raises ValueError if the model was divided among processes (FSDP) then and is not now, or the reverse.
        """
        whole = self.checkpoints()
        if not whole:
            return None
        divided = accelerator.distributed_type == DistributedType.FSDP
        if divided != any(whole[-1].glob("*fsdp*")):
            raise ValueError(
                f"{self.config.out!r} holds a run whose model was {'not ' if divided else ''}divided among processes "
                f"(FSDP), as it {'is' if divided else 'is not'} now; go on the way it began, or choose another `out`."
            )
        accelerator.load_state(str(whole[-1]))
        mine = whole[-1] / f"progress-{accelerator.process_index}.json"
        # A process that was not there when it was saved is told what the first one knew, and refused by it.
        return json.loads((mine if mine.is_file() else whole[-1] / "progress-0.json").read_text(encoding="utf-8"))

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-[0-9]*"))

    def last_checkpoint(self) -> str:
        """A sentence on what there is to go back to."""
        whole = self.checkpoints()
        return f"The last good checkpoint is {whole[-1]}." if whole else "There is no checkpoint yet."

    def is_finished(self) -> bool:
        return (self.path / "model").is_dir()

    def finish(self):
        """Drops what only a run in progress needs."""
        for folder in (*self.path.glob("checkpoint-*"), self.path / "states"):
            shutil.rmtree(folder, ignore_errors=True)

    def write_model(self, name: str, model, weights: dict, tokenizer):
        """Writes a model of these weights and its tokenizer as a folder that `load` reads."""
        building = self.path / "model-building"
        shutil.rmtree(building, ignore_errors=True)
        model.save_pretrained(building, state_dict=weights)
        tokenizer.save_pretrained(building)
        shutil.rmtree(self.path / name, ignore_errors=True)
        building.rename(self.path / name)

    def write_history(self, history: list[dict]):
        import pandas as pd

        write_text(self.path / "history.csv", pd.DataFrame(history).to_csv(index=False))

    def history(self):
        """The history so far, a DataFrame with one row for each evaluation."""
        import pandas as pd

        return pd.read_csv(self.path / "history.csv")


@contextmanager
def no_warning_of_shared_weights():
    """Accelerate warns at every save that the output embedding is the input embedding, as it should be."""
    logger = logging.getLogger("accelerate.utils.other")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
