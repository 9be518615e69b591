"""Measures the stored tables of 06_reading that need the small models of `models.py`, or text that is not shipped.

    python data/reading/make.py --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz --lexsim lexsim

Ships `seed-0` to `seed-2` here, in half precision, and writes a CSV for each table. The notebook measures the other
tables itself; see `make reading`.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from backpack_lib.analysis import bias, similarity
from backpack_lib.analysis.bigrams import Bigrams, losses_by_part
from backpack_lib.analysis.matching import compare_models
from backpack_lib.analysis.roles import PERSONS, persons_and_pronouns, relation_auc, relations_of_text
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.files import data_folder, runs_folder, write_text
from backpack_lib.lessons.reading import rows_of_corpus, words_to_compare
from backpack_lib.loading import export, fingerprint, load
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.writing import ids_of_text

HERE, RUNS = Path(__file__).resolve().parent, runs_folder() / "reading"
SHIPPED, TRANSFORMERS = ("seed-0", "seed-1", "seed-2"), ("transformer-0", "transformer-1")
OF_K = ("seed-0", "senses-4", "senses-1", "transformer-0")
COUNTED_CHARACTERS, ROLE_CHARACTERS = 30_000_000, 3_000_000
FREQUENCIES = {"below 100": 0, "100 to 1,000": 100, "1,000 to 10,000": 1000, "10,000 and more": 10_000}
PARTS = ["model", "last token", "last token, renormalised", "counted bigrams", "counted words"]


def save(table: pd.DataFrame, name: str):
    write_text(HERE / f"{name}.csv", table.round(5).to_csv(index=False))


# ---------------------------------------------------------------- the last word's part


def bigrams_of(tokenizer, corpus: str) -> Bigrams:
    """Bigrams counted on the first characters of the text that the models were trained on."""
    texts = first_characters(open_corpus(corpus).read(), COUNTED_CHARACTERS)
    return Bigrams((ids_of_text(tokenizer, text) for text in texts), len(tokenizer))


def table_of_demo(corpus: str, valid: str):
    model, tokenizer = load("demo")
    nats = losses_by_part(model, rows_of_corpus(model, tokenizer, valid), bigrams_of(tokenizer, corpus))
    save(nats[PARTS].mean().to_frame().T.assign(weights=fingerprint(model)), "bigrams_of_demo")


def by_frequency(nats: pd.DataFrame, bigrams: Bigrams) -> pd.DataFrame:
    """Mean losses by how often the last token stands in the counted text, and how many tokens that are."""
    edges = [*FREQUENCIES.values(), np.inf]
    met = pd.cut(bigrams.of_x[nats["last"]], edges, right=False, labels=list(FREQUENCIES))
    groups = nats[PARTS].groupby(met, observed=True)
    return groups.mean().assign(tokens=groups.size()).rename_axis("last token is met").reset_index()


def tables_of_bigrams(corpus: str, valid: str):
    """The last word's part over training, by frequency, and by sense, of the first small model."""
    small, tokenizer = load(HERE / "seed-0")
    bigrams, rows = bigrams_of(tokenizer, corpus), rows_of_corpus(small, tokenizer, valid)
    over_training = []
    for folder in sorted((RUNS / "seed-0").glob("model-*")):
        means = losses_by_part(load(folder)[0], rows, bigrams)[PARTS].mean()
        over_training.append({"step": int(folder.name.split("-")[1]), **means})
    save(pd.DataFrame(over_training), "bigrams_over_training")
    save(by_frequency(losses_by_part(small, rows, bigrams), bigrams), "bigrams_by_frequency")
    save(bigram_correlations(small, bigrams, *words_to_compare(tokenizer)).reset_index(), "bigrams_by_sense")


@torch.no_grad()
def bigram_correlations(model, bigrams: Bigrams, tokens: torch.Tensor, among: torch.Tensor) -> pd.DataFrame:
    """Is a sense the bigram model? Spearman's rho of each sense's pushes and counted log p(y | x) - log p(y).

    tokens: words x; among: words y to rank. -> a row for each sense: the mean over words, and the same with another
    word's counts in the place of each word's, which says what words have in common.
    """
    E = model.get_output_embeddings().weight[among]
    pushes = (model.sense_vectors(tokens) @ E.T).numpy()  # (n, k, m)
    x, y = np.meshgrid(tokens.numpy(), among.numpy(), indexing="ij")
    counted = bigrams.log_probs(x.ravel(), y.ravel()).reshape(x.shape) - np.log(bigrams.unigram[y])  # (n, m)
    ranks, ranks_of_counts = standard_ranks(pushes), standard_ranks(counted)[:, None]
    own = (ranks * ranks_of_counts).sum(-1).mean(0)
    other = (ranks * np.roll(ranks_of_counts, 1, axis=0)).sum(-1).mean(0)
    return pd.DataFrame({"own bigrams": own, "another word": other}).rename_axis("sense")


def standard_ranks(table: np.ndarray) -> np.ndarray:
    """The ranks of each row, of mean zero and length one, so that a product of two is Spearman's rho; 0 of a constant."""
    ranks = rankdata(table, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    return ranks / np.maximum(np.linalg.norm(ranks, axis=-1, keepdims=True), 1e-12)


# ---------------------------------------------------------------- seeds


def auc_of_roles(models: dict, tokenizer, text: str) -> pd.DataFrame:
    """The AUC of each sense in each relation of a text, and for pronouns of persons: model, relation, sense, auc."""
    pairs = relations_of_text(tokenizer, first_characters(open_corpus(text).read(), ROLE_CHARACTERS))
    people = pd.read_csv(data_folder() / "professions.csv")["profession"]
    pairs[PERSONS], others = persons_and_pronouns(tokenizer, people)
    rows = []
    for name, model in models.items():
        for relation, true in pairs.items():
            auc = relation_auc(model, true, others if relation == PERSONS else None)
            rows += [(name, relation, sense, value) for sense, value in enumerate(auc)]
    return pd.DataFrame(rows, columns=["model", "relation", "sense", "auc"])


def returning_roles(roles: pd.DataFrame, partners: dict) -> pd.DataFrame:
    """Does the sense that is best for a relation in one model have as its partner the best one in another?"""
    tables = []
    for relation, of_relation in roles.groupby("relation", sort=False):
        rows = of_relation.loc[of_relation.groupby("model")["auc"].idxmax()]
        best = {row.model: (row.sense, row.auc) for row in rows.itertuples()}
        tables.append(compare_best(best, partners, "auc").assign(relation=relation))
    table = pd.concat(tables, ignore_index=True)
    return table[["relation", *table.columns.drop("relation")]]


def gender_of(models: dict, tokenizer, partners: dict) -> pd.DataFrame:
    """Which sense carries most of the differences between professions in each model; are they partners?"""
    people = list(pd.read_csv(data_folder() / "professions.csv")["profession"])
    templates = json.loads((data_folder() / "prompts.json").read_text(encoding="utf-8"))["english"]
    best = {}
    for name, model in models.items():
        split = bias.split_odds(model, tokenizer, people, templates["fit"] + templates["test"], bias.PAIR)
        shares = bias.shares(split.odds, split.own)
        best[name] = int(shares.argmax()), float(shares.max())
    return compare_best(best, partners, "share")


def compare_best(best: dict[str, tuple[int, float]], partners: dict, value: str) -> pd.DataFrame:
    """A row for each pair of models: their best senses, the `value` of each, and whether they are partners."""
    rows = []
    for (one, other), partner in partners.items():
        (sense, first), (other_sense, second) = best[one], best[other]
        rows.append((one, other, sense, other_sense, first, second, partner[sense] == other_sense))
    columns = ["one", "other", "sense", "other sense", value, f"other {value}", "partners"]
    return pd.DataFrame(rows, columns=columns)


def tables_of_seeds(valid: str):
    """Likeness, roles and gender across seeds; and Transformers."""
    models, tokenizer = {name: load(HERE / name)[0] for name in SHIPPED}, load(HERE / SHIPPED[0])[1]
    transformers = {name: load(RUNS / name / "model")[0] for name in TRANSFORMERS}
    table, partners = compare_models(models, *words_to_compare(tokenizer))
    others, _ = compare_models(transformers, *words_to_compare(tokenizer))
    save(pd.concat([table.assign(what="senses"), others.assign(what="Transformer's embeddings")]), "seeds")
    save(returning_roles(auc_of_roles(models, tokenizer, valid), partners), "returning")
    save(gender_of(models, tokenizer, partners), "gender")


# ---------------------------------------------------------------- numbers of senses


def table_of_k(valid: str, lexsim: str):
    """Loss and word similarity of the small models by their number of senses.

    similarity: how well senses agree with people, held-out rho, mean over the sets. Beside it, how much better the
    first model does, on the same pairs (with its 95 % interval).
    """
    texts = list(islice((text for text in open_corpus(valid).read() if len(text) > 200), 200))
    sets = similarity.read_sets(lexsim)
    rows, methods = {}, {}
    for name in OF_K:
        model, tokenizer = load(RUNS / name / "model")
        methods[name] = similarity.of_model(model, tokenizer)
        rows[name] = {
            "senses": getattr(model.config, "num_senses", 0),
            "parameters": model.num_parameters(),
            "bits per byte": bits_per_byte(model, tokenizer, texts),
            "similarity": similarity.held_out_table(methods[name], sets)["rho"].mean(),
        }
    better = similarity.paired_differences(methods, sets).xs("mean", level="set")
    table = pd.DataFrame(rows).T.join(better.rename(columns={"difference": f"{OF_K[0]} better by"}))
    save(table.astype({"senses": int, "parameters": int}).rename_axis("model").reset_index(), "senses")


def make(corpus: str, valid: str, lexsim: str):
    torch.manual_seed(0)
    table_of_demo(corpus, valid)
    for name in SHIPPED:
        export(HERE / name, *load(RUNS / name / "model"))
    tables_of_seeds(valid)
    tables_of_bigrams(corpus, valid)
    table_of_k(valid, lexsim)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="training text: paths or globs, commas between them")
    parser.add_argument("--valid", required=True, help="validation text")
    parser.add_argument("--lexsim", required=True, help="folder or URL of the word similarity sets")
    options = parser.parse_args()
    make(options.corpus, options.valid, options.lexsim)
