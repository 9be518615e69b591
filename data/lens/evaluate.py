"""Measures how much of a Transformer's prediction the senses of its lens explain; writes figures and card here.

python data/lens/evaluate.py --lens smollm2 --text corpus/simple-valid.txt.xz
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from string import Template

import pandas as pd
import torch
import torch.nn.functional as F
import yaml

from backpack_lib import load
from backpack_lib.analysis.attribution import read
from backpack_lib.analysis.bias import fill, tokens_of_pair
from backpack_lib.display.tables import markdown, word_senses
from backpack_lib.files import exit_status, write_text
from backpack_lib.model.hooks import hooked
from backpack_lib.model.lens import SenseLens
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.writing import ids_of_text

HERE = Path(__file__).resolve().parent
TOKENS = 8_192  # of the text that are read, at each length
LENGTHS = (128, 256)
WORDS = ("bank", "light", "nurse", "Paris", "king", "ate", "because")
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


class Explained:
    """Sums, over positions, of what tells how near some states' logits come to the base's."""

    def __init__(self, lens: SenseLens):
        self.lens, self.n, self.sums = lens, 0, torch.zeros(5, dtype=torch.float64)

    def add(self, ids, h, o):
        """(B, T), (B, T, d), (B, T, d): tokens, the base's states, and those to judge."""
        truth = self.lens.logits_of(h[:, :-1]).flatten(0, 1)
        judged = self.lens.logits_of(o[:, :-1]).flatten(0, 1)
        log_p, log_q, label = truth.log_softmax(-1), judged.log_softmax(-1), ids[:, 1:].flatten()
        centred, error = (x - x.mean(-1, keepdim=True) for x in (truth, truth - judged))
        sums = (
            F.nll_loss(log_q, label, reduction="sum"),
            F.kl_div(log_q, log_p, reduction="sum", log_target=True),
            (truth.argmax(-1) == judged.argmax(-1)).sum(),
            error.square().sum(),
            centred.square().sum(),
        )
        self.sums += torch.stack([torch.as_tensor(part).double() for part in sums])
        self.n += len(label)

    def figures(self, bytes_per_token: float) -> dict[str, float]:
        nats, kl, agreed, error, total = self.sums.tolist()
        return {
            "bits_per_byte": nats / self.n / math.log(2) / bytes_per_token,
            "kl_nats": kl / self.n,
            "first_choices_agree": agreed / self.n,
            "variance_of_logits_explained": 1 - error / total,
        }


@torch.no_grad()
def ladder(lens: SenseLens, rows, bytes_per_token: float) -> dict[str, dict]:
    """How near each comes to the base: the lens, its senses shuffled among words, the own token's senses alone."""
    judges = {name: Explained(lens) for name in ("base", "senses", "shuffled senses", "own senses alone")}
    dealt = torch.randperm(lens.config.vocab_size, generator=torch.Generator().manual_seed(0))

    def shuffled(token_ids, senses):
        return lens.sense_vectors(dealt[token_ids], patched=False)

    for ids in rows.split(4):
        states = lens.states(ids)
        h = states[..., : lens.config.n_embd]
        judges["base"].add(ids, h, h)
        judges["senses"].add(ids, h, lens.explain(ids, states))
        with hooked(lens.patches, shuffled):
            judges["shuffled senses"].add(ids, h, lens.explain(ids, states))
        own = lens.sense_vectors(ids.flatten()).sum(1).view_as(h)
        judges["own senses alone"].add(ids, h, lens.constant + own)
    return {name: judge.figures(bytes_per_token) for name, judge in judges.items()}


def pronouns(lens: SenseLens, tokenizer, occupations: list[str]) -> dict[str, float]:
    """Correlation, over occupations, of the he/she log-odds in the lens with the base's; means over templates."""
    he, she = tokens_of_pair(tokenizer, ("he", "she"))
    rows = []
    for template in TEMPLATES:
        for prompt in fill(tokenizer, occupations, [template]):
            reading = read(lens, ids_of_text(tokenizer, prompt))
            shares = reading.contributions(he, she)
            rows.append({"base": reading.total(he, she), "senses": shares[:-1].sum().item()})
    odds = pd.DataFrame(rows).assign(occupation=occupations * len(TEMPLATES)).groupby("occupation").mean()
    return {"r": odds.corr().loc["base", "senses"], "occupations": len(odds), "templates": len(TEMPLATES)}


@torch.no_grad()
def speeds(lens: SenseLens, tokenizer) -> dict[str, float]:
    """Tokens per second of generation: the base, the lens without edits and with one."""
    ids, noise = torch.tensor([ids_of_text(tokenizer, "Once upon a time")]), 1e-3

    def seconds(model):
        start = time.perf_counter()
        model.generate(ids, min_new_tokens=60, max_new_tokens=60, do_sample=False)
        return time.perf_counter() - start

    def rate(model):
        return 60 / min(seconds(model) for _ in range(3))

    plain = {"base": rate(lens.base), "lens": rate(lens)}
    with hooked(lens.patches, lambda token_ids, senses: senses + noise):
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
    for word in WORDS:
        print(word_senses(lens, tokenizer, word, n=6).to_string(), end="\n\n")
    print(json.dumps(figures, indent=1))


def card(name: str, lens: SenseLens, figures: dict) -> str:
    """The card of a lens, from the template beside this file."""
    recipe = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))[name]
    a_step = recipe["block_size"] * recipe["batch_size"]
    tables = [
        pd.DataFrame(figures[f"T={length}"]).T.add_suffix(f", T={length}").rename(columns=lambda c: c.replace("_", " "))
        for length in LENGTHS
    ]
    values = {
        "name": name,
        "base": lens.config.base,
        "base_licence": BASE_LICENCES[name],
        "num_senses": lens.config.num_senses,
        "parameters": f"{lens.num_parameters() / 1e6:.1f}",
        "tokens_different": f"{recipe['max_blocks'] * recipe['block_size'] / 1e6:.1f}",
        "tokens_seen": f"{recipe['steps'] * a_step / 1e6:.1f}",
        "tokens_read": f"{TOKENS:,}",
        "recipe": yaml.safe_dump(recipe, sort_keys=False).strip(),
        "figures": "\n\n".join(markdown(table.map("{:.3f}".format)) for table in tables),
        "pronoun_r": f"{figures['pronouns']['r']:.2f}",
        "templates": figures["pronouns"]["templates"],
        "speeds": ", ".join(f"{who} {rate:.0f}" for who, rate in figures["tokens_per_second"].items()),
        "block_size": recipe["block_size"],
    }
    return Template((HERE / "card.md").read_text(encoding="utf-8")).substitute(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lens", choices=["smollm2", "demo"], default="smollm2")
    parser.add_argument("--text", required=True, help="text that the lens was not trained on")
    given = parser.parse_args()
    return exit_status(lambda: evaluate(given.lens, given.text))


if __name__ == "__main__":
    sys.exit(main())
