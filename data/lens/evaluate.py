"""Measures how much of a Transformer's prediction the senses of its lens explain; writes figures and card here.

python data/lens/evaluate.py --lens smollm2 --text corpus/simple-valid.txt.xz
"""

import argparse
import json
import math
import timeit
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
import yaml

from backpack_lib import load
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.bias import fill, tokens_of_pair
from backpack_lib.display.tables import markdown
from backpack_lib.files import write_text
from backpack_lib.model.hooks import hooked
from backpack_lib.model.lens import SenseLens
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.writing import ids_of_text

HERE = Path(__file__).resolve().parent
TOKENS = 8_192  # of the text that are read, at each length
LENGTHS = (128, 256)
BASE_LICENCES = {
    "smollm2": "The Transformer itself is SmolLM2-135M-Instruct of Hugging Face (Apache-2.0).",
    "demo": "The Transformer itself is that of the demo.",
}
TEMPLATES = ("The {profession} said that", "The {profession} was late, because", "When the {profession} came in,")


def rows_of_text(text: str, tokenizer, length: int) -> tuple[torch.Tensor, float]:
    """Rows of tokens from a text, (n, T), and UTF-8 bytes per token."""
    documents = list(open_corpus(text).read())
    ids = [i for document in documents for i in ids_of_text(tokenizer, document)]
    size = sum(len(document.encode()) for document in documents) / len(ids)
    n = TOKENS // length
    spread = torch.linspace(0, len(ids) // length - 1, n).long()  # over the whole text
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[spread], size


def sums_of(lens: SenseLens, ids, h, o) -> torch.Tensor:
    """Sums over positions of what tells how near the logits of states o come to those of the base's states h.

    ids: tokens, (B, T); h, o: (B, T, d).
    """
    truth, judged = (lens.logits_of(states[:, :-1]).flatten(0, 1) for states in (h, o))
    label, log_q = ids[:, 1:].flatten(), judged.log_softmax(-1)
    centred, error = (x - x.mean(-1, keepdim=True) for x in (truth, truth - judged))
    sums = (
        F.nll_loss(log_q, label, reduction="sum"),
        F.kl_div(log_q, truth.log_softmax(-1), reduction="sum", log_target=True),
        (truth.argmax(-1) == judged.argmax(-1)).sum(),
        error.square().sum(),
        centred.square().sum(),
        torch.tensor(len(label)),
    )
    return torch.stack([part.double() for part in sums])


@torch.no_grad()
def ladder(lens: SenseLens, rows, bytes_per_token: float) -> dict[str, dict]:
    """How near each comes to the base: the lens, its senses shuffled among words, the own token's senses alone."""
    sums = defaultdict(float)
    dealt = torch.randperm(lens.config.vocab_size, generator=torch.Generator().manual_seed(0))

    def shuffled(token_ids, senses):
        return lens.sense_vectors(dealt[token_ids], patched=False)

    for ids in rows.split(4):
        states = lens.states(ids)
        h = states[..., : lens.config.n_embd]
        sums["base"] += sums_of(lens, ids, h, h)
        sums["senses"] += sums_of(lens, ids, h, lens.explain(ids, states))
        with hooked(lens.patches, shuffled):
            sums["shuffled senses"] += sums_of(lens, ids, h, lens.explain(ids, states))
        own = lens.sense_vectors(ids.flatten()).sum(1).view_as(h)
        sums["own senses alone"] += sums_of(lens, ids, h, lens.constant + own)
    table = {}
    for name, parts in sums.items():
        nats, kl, agreed, error, total, n = parts.tolist()
        table[name] = {
            "bits_per_byte": nats / n / math.log(2) / bytes_per_token,
            "kl_nats": kl / n,
            "first_choices_agree": agreed / n,
            "variance_of_logits_explained": 1 - error / total,
        }
    return table


def pronouns(lens: SenseLens, tokenizer, occupations: list[str]) -> dict[str, float]:
    """Correlation, over occupations, of the he/she log-odds in the lens with the base's; means over templates."""
    he, she = tokens_of_pair(tokenizer, ("he", "she"))
    rows = []
    for prompt in fill(tokenizer, occupations, list(TEMPLATES)):
        reading = read(lens, ids_of_text(tokenizer, prompt))
        rows.append((reading.total(he, she), reading.contributions(he, she)[:-1].sum().item()))
    odds = pd.DataFrame(rows, columns=["base", "senses"])
    odds = odds.groupby(odds.index // len(TEMPLATES)).mean()  # prompts of an occupation stand together
    return {"r": odds.corr().loc["base", "senses"], "occupations": len(odds), "templates": len(TEMPLATES)}


@torch.no_grad()
def speeds(lens: SenseLens, tokenizer) -> dict[str, float]:
    """Tokens per second of generation: the base, the lens without edits and with one."""
    ids = torch.tensor([ids_of_text(tokenizer, "Once upon a time")])

    def rate(model):
        seconds = timeit.repeat(
            lambda: model.generate(ids, min_new_tokens=60, max_new_tokens=60, do_sample=False), number=1, repeat=3
        )
        return 60 / min(seconds)

    plain = {"base": rate(lens.base), "lens": rate(lens)}
    with hooked(lens.patches, lambda token_ids, senses: senses + 1e-3):
        return plain | {"lens with an edit of all words": rate(lens)}


def evaluate(name: str, text: str):
    lens, tokenizer = load(f"{name}-lens")
    occupations = pd.read_csv(HERE.parent / "professions.csv")["profession"].tolist()
    figures = {"parameters": lens.num_parameters(), "pronouns": pronouns(lens, tokenizer, occupations)}
    figures["tokens_per_second"] = speeds(lens, tokenizer)
    for length in LENGTHS:
        figures[f"T={length}"] = ladder(lens, *rows_of_text(text, tokenizer, length))
    write_text(HERE / name / "evaluation.json", json.dumps(figures, indent=1))
    write_text(HERE / name / "README.md", card(name, lens, figures))


def card(name: str, lens: SenseLens, figures: dict) -> str:
    """The card of a lens, from the template beside this file."""
    recipe = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))[name]
    tables = []
    for length in LENGTHS:
        table = pd.DataFrame(figures[f"T={length}"]).T.map("{:.3f}".format)
        tables.append(markdown(table.rename(columns=lambda column: f"{column}, T={length}".replace("_", " "))))
    millions = {
        "parameters": figures["parameters"] / 1e6,
        "different": recipe["max_blocks"] * recipe["block_size"] / 1e6,
        "seen": recipe["steps"] * recipe["batch_size"] * recipe["block_size"] / 1e6,
    }
    template = (HERE / "card.md").read_text(encoding="utf-8")
    return template.format(
        name=name,
        lens=lens,
        figures=figures,
        recipe=recipe,
        millions=millions,
        tokens=TOKENS,
        licence=BASE_LICENCES[name],
        settings=yaml.safe_dump(recipe, sort_keys=False).strip(),
        tables="\n\n".join(tables),
        speeds=", ".join(f"{who} {rate:.0f}" for who, rate in figures["tokens_per_second"].items()),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lens", choices=["smollm2", "demo"], default="smollm2")
    parser.add_argument("--text", required=True, help="text that the lens was not trained on")
    options = parser.parse_args()
    evaluate(options.lens, options.text)
