"""Measures the stored tables of 06_reading that need the small models of `models.py`, or text that is not shipped.

    python data/reading/make.py --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz --lexsim lexsim

Ships `seed-0` to `seed-2` here, in half precision, and writes a CSV for each table. `--demo-only` renews the table of
the demo model, which needs none of the small ones. The notebook measures the other tables itself; see `make reading`.
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import pearsonr, rankdata

from backpack_lib.analysis import bias, similarity
from backpack_lib.analysis.bigrams import Bigrams, losses_by_part
from backpack_lib.analysis.matching import compare_models
from backpack_lib.analysis.roles import PERSONS, persons_and_pronouns, relation_auc, relations_of_text
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.files import data_folder, exit_status, runs_folder, write_text
from backpack_lib.lessons.reading import rows_of_corpus, words_to_compare
from backpack_lib.loading import export, fingerprint, load
from backpack_lib.text.corpora import first_characters, open_corpus

HERE = Path(__file__).resolve().parent
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
    end = tokenizer.eos_token_id
    rows = ([end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] for text in texts)
    return Bigrams(rows, len(tokenizer))


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


def tables_of_bigrams(corpus: str, valid: str, runs: Path):
    """The last word's part over training, by frequency, and by sense, of the first small model."""
    small, tokenizer = load(HERE / "seed-0")
    bigrams, rows = bigrams_of(tokenizer, corpus), rows_of_corpus(small, tokenizer, valid)
    over_training = []
    for folder in sorted((runs / "seed-0").glob("model-*")):
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
    ranks, ranks_of_counts = rankdata(pushes, axis=-1), rankdata(counted, axis=-1)[:, None]
    own = pearsonr(ranks, ranks_of_counts, axis=-1).statistic.mean(0)
    other = pearsonr(ranks, np.roll(ranks_of_counts, 1, axis=0), axis=-1).statistic.mean(0)
    return pd.DataFrame({"own bigrams": own, "another word": other}).rename_axis("sense")


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
    """Does the sense that is best for a relation in one model have as its partner the best one in another?

    -> a row for each relation and pair of models: the two best senses, their AUCs, and whether they are partners.
    """
    best = roles.loc[roles.groupby(["model", "relation"])["auc"].idxmax()].set_index(["relation", "model"])
    rows = []
    for relation in roles["relation"].unique():
        for (one, other), partner in partners.items():
            (sense, auc), (other_sense, other_auc) = (
                best.loc[(relation, name), ["sense", "auc"]] for name in (one, other)
            )
            same = partner[int(sense)] == other_sense
            rows.append((relation, one, other, int(sense), int(other_sense), auc, other_auc, same))
    columns = ["relation", "one", "other", "sense", "other sense", "auc", "other auc", "partners"]
    return pd.DataFrame(rows, columns=columns)


def gender_of(models: dict, tokenizer, partners: dict) -> pd.DataFrame:
    """Which sense carries most of the differences between professions in each model; are they partners?"""
    people = list(pd.read_csv(data_folder() / "professions.csv")["profession"])
    templates = json.loads((data_folder() / "prompts.json").read_text(encoding="utf-8"))["english"]
    best = {}
    for name, model in models.items():
        split = bias.split_odds(model, tokenizer, people, templates["fit"] + templates["test"], bias.PAIR)
        shares = bias.shares(split.odds, split.own)
        best[name] = int(shares.argmax()), float(shares.max())
    rows = []
    for (one, other), partner in partners.items():
        (sense, share), (other_sense, other_share) = best[one], best[other]
        rows.append((one, other, sense, other_sense, share, other_share, partner[sense] == other_sense))
    columns = ["one", "other", "sense", "other sense", "share", "other share", "partners"]
    return pd.DataFrame(rows, columns=columns)


def tables_of_seeds(valid: str, runs: Path):
    """Likeness, roles and gender across seeds; and Transformers."""
    models, tokenizer = {name: load(HERE / name)[0] for name in SHIPPED}, load(HERE / SHIPPED[0])[1]
    transformers = {name: load(runs / name / "model")[0] for name in TRANSFORMERS}
    table, partners = compare_models(models, *words_to_compare(tokenizer))
    others, _ = compare_models(transformers, *words_to_compare(tokenizer))
    save(pd.concat([table.assign(what="senses"), others.assign(what="Transformer's embeddings")]), "seeds")
    save(returning_roles(auc_of_roles(models, tokenizer, valid), partners), "returning")
    save(gender_of(models, tokenizer, partners), "gender")


# ---------------------------------------------------------------- numbers of senses


def table_of_k(valid: str, runs: Path, lexsim: str):
    """Loss and word similarity of the small models by their number of senses.

    similarity: how well senses agree with people, held-out rho, mean over the sets. Beside it, how much better the
    first model does, on the same pairs (with its 95 % interval).
    """
    texts = list(islice((text for text in open_corpus(valid).read() if len(text) > 200), 200))
    sets = similarity.read_sets(lexsim)
    rows, methods = {}, {}
    for name in OF_K:
        model, tokenizer = load(runs / name / "model")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="training text: paths or globs, commas between them")
    parser.add_argument("--valid", required=True, help="validation text")
    parser.add_argument("--runs", type=Path, default=runs_folder() / "reading", help="where models.py keeps its runs")
    parser.add_argument("--lexsim", required=True, help="folder or URL of the word similarity sets")
    parser.add_argument("--demo-only", action="store_true", help="measure the demo model, and leave the others")
    options = parser.parse_args()

    def make():
        torch.manual_seed(0)
        table_of_demo(options.corpus, options.valid)
        if options.demo_only:
            return
        for name in SHIPPED:
            export(HERE / name, *load(options.runs / name / "model"))
        tables_of_seeds(options.valid, options.runs)
        tables_of_bigrams(options.corpus, options.valid, options.runs)
        table_of_k(options.valid, options.runs, options.lexsim)

    return exit_status(make)


if __name__ == "__main__":
    sys.exit(main())
