"""How a notebook begins: with a model, its tokenizer, words and texts that suit it, and a folder for results.

What suits a model is data: `data/examples.yaml` has an entry for each notebook and kind of model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from backpack_lib.files import data_folder, write_text
from backpack_lib.lessons.results import open_results, write_results
from backpack_lib.loading import is_planted, load
from backpack_lib.model.kinds import require_senses, used_tokens
from backpack_lib.text import planted

PLANTED, ENGLISH = "planted", "english"


@dataclass
class Lesson:
    """What a notebook works on.

    example: the words and texts to use, as attributes. embeddings: E, the output embedding, (V, d). common: ids of
    tokens that are worth showing, (n,): of the planted text, those that it uses.
    """

    name: str
    model: Any
    tokenizer: Any
    kind: str
    example: SimpleNamespace
    folder: Path
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def embeddings(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight.detach()

    @property
    def senses(self) -> int:
        return self.model.config.num_senses

    @property
    def common(self) -> torch.Tensor:
        if self.kind == PLANTED:
            return torch.tensor(planted.tokens_in_use(self.tokenizer), device=self.model.device)
        return used_tokens(self.model)

    def keep(self, table, name: str):
        """Writes a DataFrame beside the notebook's results, as `name`.csv, and returns it."""
        write_text(self.folder / f"{name}.csv", table.to_csv())
        return table

    def close(self, headline: str):
        """Writes `results.json`: the headline, and the numbers that were noted."""
        write_results(self.folder, headline, self.numbers)


def open_lesson(name: str, model: str = "demo", out: str = "", device: str = "cpu", **given) -> Lesson:
    """Loads a notebook's model and the examples that suit it; what is given and not empty is used instead.

    Raises ValueError as `load` does, and for a model that is no Backpack.
    """
    backpack, tokenizer = load(model, device=device)
    require_senses(backpack)
    kind = PLANTED if is_planted(model) else ENGLISH
    example = examples(name, kind) | {key: value for key, value in given.items() if value not in ("", [], None)}
    return Lesson(name, backpack, tokenizer, kind, SimpleNamespace(**example), open_results(name, out))


def examples(name: str, kind: str) -> dict:
    """The entry of a notebook and kind of model in `data/examples.yaml`."""
    import yaml

    return yaml.safe_load((data_folder() / "examples.yaml").read_text(encoding="utf-8"))[name][kind]
