"""The folder of a training run: what it holds, and how nothing in it is ever half-written.

    out/settings.json          what the run is; another run is not mixed into it
    out/checkpoint-00000500/   everything to go on from step 500 as if nothing had happened
    out/model/                 the finished model and its tokenizer
    out/model-00000500/        the model as it was at step 500, where `keep_models` asks for it
    out/history.csv            the history so far

Folders and files are written under another name and renamed once they are whole.
"""

import json
import logging
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import DistributedType
from safetensors import SafetensorError

from backpack_lib.files import first_line, let_others_read, write_text
from backpack_lib.loading import no_progress_bar
from backpack_lib.training.config import TrainingConfig

# A checkpoint holds the weights and AdamW's two averages, 4 bytes each; the next one is written
# before the last is deleted, and the finished model comes on top.
BYTES_PER_PARAMETER = 2 * 3 * 4 + 4


class RunFolder:
    """Reads and writes one run's folder. Raises ValueError if it holds another run, OSError if it can't be written."""

    def __init__(self, config: TrainingConfig):
        self.config = config
        self.path = Path(config.out)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise OSError(f"The folder {config.out!r} cannot be written: {error}; choose another `out`.") from error
        self._check_settings()

    def _check_settings(self):
        file = self.path / "settings.json"
        now = self.config.identity()
        if not file.is_file():
            write_text(file, json.dumps(now, indent=1))
            return
        before = json.loads(file.read_text())
        changed = [
            f"{name}={before.get(name)!r}, not {now.get(name)!r}" for name in now if before.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.config.out!r} already holds a run with {', '.join(changed)}; "
                "choose another `out`, or the old settings to resume that run."
            )

    def check_space(self, model):
        """Raises OSError if the disk has no room for this model's checkpoints."""
        needed = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                f"The run needs about {needed / 1e6:,.0f} MB for its checkpoints, but the disk of {self.config.out!r} "
                f"has {free / 1e6:,.0f} MB left; free some space or choose another `out`."
            )

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoint-[0-9]*"))

    def last_checkpoint(self) -> str:
        """A sentence on what there is to go back to."""
        whole = self.checkpoints()
        return f"The last whole checkpoint is {whole[-1].name}." if whole else "There is no checkpoint yet."

    def save(self, accelerator, progress: dict):
        """Writes a checkpoint of everything that `accelerator` prepared and of `progress`, then drops older ones.

        progress: plain numbers, strings, lists and dicts; `progress["step"]` names the checkpoint. Each
        process writes its own.
        """
        older = self.checkpoints()
        building = self.path / "checkpoint-building"
        try:
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
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {progress['step']} could not be written: {first_line(error)}. "
                f"{self.last_checkpoint()}"
            ) from error
        if accelerator.is_main_process:
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
        return json.loads((mine if mine.is_file() else whole[-1] / "progress-0.json").read_text())

    # ------------------------------------------------------------ results

    def is_finished(self) -> bool:
        return (self.path / "model").is_dir()

    def finish(self, model, weights: dict, tokenizer):
        """Writes the finished model, of these weights, and its tokenizer; the checkpoints are no longer needed."""
        self.write_model("model", model, weights, tokenizer)
        for folder in (*self.path.glob("checkpoint-*"), self.path / "states"):
            shutil.rmtree(folder, ignore_errors=True)

    def write_model(self, name: str, model, weights: dict, tokenizer):
        """Writes a model of these weights and its tokenizer as a folder that `load` reads."""
        building = self.path / "model-building"
        shutil.rmtree(building, ignore_errors=True)
        try:
            with no_progress_bar():
                model.save_pretrained(building, state_dict=weights)
            tokenizer.save_pretrained(building)
            let_others_read(building)
            shutil.rmtree(self.path / name, ignore_errors=True)
            building.rename(self.path / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(building, ignore_errors=True)
            raise OSError(
                f"The {name} could not be written ({first_line(error)}); "
                "make room and run the same command again: it resumes from the last checkpoint."
            ) from error

    def write_history(self, history: list[dict]):
        import pandas as pd

        write_text(self.path / "history.csv", pd.DataFrame(history).to_csv(index=False))

    def history(self):
        """The history so far, as a DataFrame with one row for each evaluation."""
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
