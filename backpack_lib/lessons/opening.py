"""How a notebook begins: with a model, its tokenizer, words and texts that suit it, and a folder for results.

What suits a model is data: `data/examples.yaml` has an entry for each notebook and kind of model.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import yaml

from backpack_lib.analysis.attribution import read
from backpack_lib.files import as_seen, data_folder, read_file
from backpack_lib.lessons.results import Results, open_results
from backpack_lib.loading import fingerprint, is_planted, load
from backpack_lib.model.kinds import require_senses
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.words import readable, spell, tokens_of_word
from backpack_lib.text.writing import continue_texts, ids_of_text

PLANTED, ENGLISH = "planted", "english"
COMMON = 6000  # words


@dataclass(kw_only=True)
class Lesson(Results):
    """What a notebook works on.

    name: of the model, as it was asked for. example: the words and texts to use, as attributes. embeddings: E, the
    output embedding, (V, d), in the scale of the logits.
    """

    name: str
    model: Any
    tokenizer: Any
    kind: str
    example: SimpleNamespace

    @property
    def embeddings(self) -> torch.Tensor:
        E, scale = self.model.get_output_embeddings().weight.detach(), getattr(self.model, "logit_scale", 1.0)
        return E if scale == 1 else E * scale  # some Transformers, below a sense lens, scale their logits

    @property
    def senses(self) -> int:
        return self.model.config.num_senses

    @property
    def common(self) -> torch.Tensor:
        """Ids of common whole words, as far as the order of the vocabulary tells; of planted text, all that it uses."""
        if self.kind == PLANTED:
            ids = planted.tokens_in_use(self.tokenizer)
        else:
            names = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
            ids = [i for i, name in enumerate(names) if re.fullmatch("Ġ[A-Za-z]{2,}", name)][:COMMON]
        return torch.tensor(ids, device=self.model.device)

    def __str__(self) -> str:
        size = self.model.num_parameters() / 1e6
        senses = f"{self.senses} senses for each of {len(self.tokenizer):,} tokens"
        return f"{size:.1f} million parameters; {senses}; on {self.model.device}"

    def tokens_of(self, name: str) -> list[int]:
        """The token ids of a word among the examples."""
        return tokens_of_word(self.tokenizer, getattr(self.example, name))

    def texts(
        self, reference: str, generated: Iterable, beginnings: list[str], tokens: int, seed: int, writer=None
    ) -> tuple[Iterable[str], str]:
        """Texts to measure on, and what they are: a reference's, by people; without one, planted or by a model.

        generated: by `planted.generate`, for a planted model. beginnings: what the model, or another writer, continues
        otherwise, by so many tokens, or as many as fit its context.
        """
        if reference:
            return open_corpus(reference).read(), "text by people"
        if self.kind == PLANTED:
            return [text.text for text in generated], "planted text"
        writer = self.model if writer is None else writer
        tokens = min(tokens, writer.config.max_position_embeddings - 1)
        return continue_texts(writer, self.tokenizer, beginnings, tokens, seed, top_k=0), "texts by the model"

    def stored(self, file: str, command: str, column: str = "weights", of: str = "") -> pd.DataFrame | None:
        """A table of `data/` that a command measured of the demo model, by the weights in a column; None of others.

        of: which of the rows are of this model (a pandas query), where some are of another.
        """
        if self.name != "demo":
            return None
        table = pd.read_csv(data_folder() / file)
        self.check_stored((table.query(of) if of else table)[column], command)
        return table

    def check_stored(self, weights: Iterable[str], command: str):
        """Raises ValueError if what is stored was measured on other weights than this model's."""
        if set(weights) != {fingerprint(self.model)}:
            raise ValueError(f"What is stored is of other weights than the demo model's; run: {command}")


def open_lesson(name: str, model: str = "demo", out: str = "", device: str = "cpu", **given) -> Lesson:
    """Loads a notebook's model and the examples that suit it; what is given and not empty is used instead.

    A text that is given without a next word to ask for gets the likeliest two, `target` and `contrast`.
    """
    backpack, tokenizer = load(model, device=device)
    require_senses(backpack)
    kind = PLANTED if is_planted(model) else ENGLISH
    given = {key: value for key, value in given.items() if value not in ("", [], None)}
    if "text" in given:
        given = dict(zip(("target", "contrast"), likeliest_words(backpack, tokenizer, given["text"]))) | given
    example = examples(name, kind) | given
    return Lesson(
        folder=open_results(name, out),
        name=model,
        model=backpack,
        tokenizer=tokenizer,
        kind=kind,
        example=SimpleNamespace(**example),
    )


def read_json(file: str, default: str):
    """What a JSON file holds; "" for one of `data/`, named by `default`."""
    path = as_seen(file) or data_folder() / default
    return read_file(path, lambda file: json.loads(Path(file).read_text(encoding="utf-8-sig")))


def likeliest_words(model, tokenizer, text: str, n: int = 2) -> list[str]:
    """The likeliest next words after a text, as far as they can be written."""
    log_probs, found = read(model, ids_of_text(tokenizer, text)).log_probs(), []
    for token in log_probs.argsort(descending=True).tolist():
        if readable(tokenizer, token):
            found += spell(tokenizer, [token])
        if len(found) == n:
            break
    return found


def examples(name: str, kind: str) -> dict:
    """The entry of a notebook and kind of model in `data/examples.yaml`."""
    return yaml.safe_load((data_folder() / "examples.yaml").read_text(encoding="utf-8"))[name][kind]
