"""Measures the demo model and its baseline, and writes what it found into this folder.

    python data/demo/evaluate.py --text simple-valid.txt.xz --lexsim lexsim \\
        --older "part-*.txt.xz" --corpus "simple-*.txt.xz" --before runs/demo

`evaluation.json` holds every figure; each model's card is written from it by `cards.py`.
"""

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from cards import ARCHITECTURE_OF, HERE, write_cards

from backpack_lib import load
from backpack_lib.analysis import roles, similarity
from backpack_lib.analysis.bias import fill, ratio, tokens_of_pair
from backpack_lib.analysis.scores import bits_per_byte, next_log_probabilities, token_nats
from backpack_lib.analysis.statistics import bootstrap
from backpack_lib.files import write_text
from backpack_lib.lessons.bias import rank_correlation
from backpack_lib.loading import fingerprint
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.words import tokens_of_word
from backpack_lib.text.writing import continue_text, ids_of_text
from backpack_lib.training.build import keep_freed_memory

RELATED = 7.0  # of ten: from this score on, two words are related
SAMPLE_SETTINGS = {"top_p": 0.8, "temperature": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 60}
PROFESSIONS = pd.read_csv(HERE.parent / "professions.csv")


def pronouns(model, tokenizer) -> dict[str, float]:
    """How likely "he" and "she" are after a profession, and how truly to the world the model ties them to it.

    All over the templates on which 04_gender_bias measures, which nothing is fitted to. mass: mean of p(he) + p(she);
    ratio: mean of the likelier of the two over the other; rho: Spearman's, of log p(he)/p(she) and the share of men,
    with the 95 % interval over professions and templates.
    """
    templates = json.loads((HERE.parent / "prompts.json").read_text())["english"]["test"]
    log_p = next_log_probabilities(model, tokenizer, fill(tokenizer, list(PROFESSIONS["profession"]), templates))
    log_p = log_p[:, list(tokens_of_pair(tokenizer, ("he", "she")))].view(len(PROFESSIONS), len(templates), 2)
    odds = (log_p[..., 0] - log_p[..., 1]).cpu().numpy()
    men = np.broadcast_to(100 - PROFESSIONS["percent_women"].to_numpy()[:, None], odds.shape)
    low, high = bootstrap(rank_correlation, odds, men, axes=2)
    figures = {
        "mass": log_p.exp().sum(-1).mean(),
        "ratio": ratio(odds),
        "rho": rank_correlation(odds, men),
        "rho_low": low,
        "rho_high": high,
    }
    return {name: float(figure) for name, figure in figures.items()}


def related_words(tokenizer, pairs: pd.DataFrame) -> np.ndarray:
    """Pairs of words that people found related, both ways round, where both are single tokens. (n, 2)"""
    related = pairs.loc[pairs["score"] >= RELATED, ["word1", "word2"]].to_numpy()
    ids = [[tokens_of_word(tokenizer, word) for word in pair] for pair in related]
    single = np.array([(a[0], b[0]) for a, b in ids if len(a) == len(b) == 1 and a != b], dtype=int).reshape(-1, 2)
    return np.concatenate([single, single[:, ::-1]])


def sense_roles(model, tokenizer, texts: list[str], sets: dict[str, pd.DataFrame]) -> dict:
    """The evidence for what each sense does; see `roles.py`."""
    verbs = sorted({*sets["SimVerb-3500"]["word1"]}) if "SimVerb-3500" in sets else []
    pairs = roles.relations_of_text(tokenizer, texts, verbs)
    if "WS-353" in sets:
        pairs["related word"] = related_words(tokenizer, sets["WS-353"])
    auc, untrained, consistency = roles.evidence(model, tokenizer, pairs, [*PROFESSIONS["profession"], *roles.PEOPLE])
    tables = {"auc": auc.to_dict("list"), "auc_untrained": untrained.to_dict("list")}
    return tables | {"consistency": consistency.T.to_dict()}


def word_similarity(senses_of, sets: dict[str, pd.DataFrame]) -> dict:
    """Every similarity on every set, and how well the best of them does where it was not picked."""
    return {
        "similarity": similarity.similarity_table(senses_of, sets).to_dict(),
        "similarity_held_out": similarity.held_out_table(senses_of, sets).to_dict("index"),
    }


def of_word2vec(characters: dict[str, int], width: int):
    """gensim's skip-gram with negative sampling, five passes over the first so many characters of each corpus.

    Its two workers race, so its figures differ by a hair from run to run. -> the function from words to their vectors,
    (n, 1, d); an unknown word gets zeros.
    """
    from gensim.models import Word2Vec
    from gensim.utils import simple_preprocess

    texts = (text for corpus, most in characters.items() for text in first_characters(open_corpus(corpus).read(), most))
    words = [simple_preprocess(text) for text in texts]
    settings = {"vector_size": width, "window": 5, "min_count": 5, "sg": 1, "negative": 5, "epochs": 5}
    vectors = Word2Vec(words, **settings, workers=2, seed=0).wv
    unknown = np.zeros((1, width), np.float32)

    def senses_of(words: list[str]) -> torch.Tensor:
        rows = [vectors[[word.lower()]] if word.lower() in vectors else unknown for word in words]
        return torch.from_numpy(np.stack(rows))

    return senses_of


def training_of(architecture: str) -> dict:
    """What a model has read, in tokens and bytes of each text, and the hours that this took."""
    history = pd.read_csv(HERE / architecture / "history.csv")
    parts = history.groupby("text", sort=False)
    read = history["tokens"] - parts["tokens"].shift(fill_value=0)  # since the row before
    ends = parts.last()
    return {
        "tokens_seen": int(ends["tokens"].sum()),
        "tokens_of": ends["tokens"].astype(int).to_dict(),
        "bytes_of": (ends["tokens"] * ends["bytes_per_token"]).astype(int).to_dict(),
        "hours": (read / history["tokens_per_second"]).sum() / 3600,
    }


def read_blimp(source: str) -> pd.DataFrame:
    """BLiMP's pairs (Warstadt et al., 2020), from a folder of its .jsonl files or from the Hugging Face hub."""
    if files := sorted(Path(source).glob("*.jsonl")):
        return pd.concat([pd.read_json(file, lines=True) for file in files], ignore_index=True)
    names = datasets.get_dataset_config_names(source)
    return pd.concat([datasets.load_dataset(source, name, split="train").to_pandas() for name in names])


def blimp_accuracy(model, tokenizer, pairs: pd.DataFrame) -> pd.Series:
    """The share of each phenomenon's pairs in which the grammatical sentence is the likelier one."""
    nats = {}
    for column in ("sentence_good", "sentence_bad"):
        losses = token_nats(model, [ids_of_text(tokenizer, sentence) for sentence in pairs[column]])
        nats[column] = torch.stack([of_sentence.sum() for of_sentence in losses]).numpy()
    right = pd.Series(nats["sentence_good"] < nats["sentence_bad"])
    return right.groupby(pairs["UID"].to_numpy()).mean()


def what_it_knows(model, tokenizer, texts: list[str], blimp, sets) -> dict:
    """How well a model predicts text and grammar, how alike it finds words, and which pronouns it expects."""
    accuracy = blimp_accuracy(model, tokenizer, blimp)
    return {
        "weights": fingerprint(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": bits_per_byte(model, tokenizer, texts),
        "bits_per_byte_of_a_tenth": bits_per_byte(model, tokenizer, texts[::10]),  # quick to measure again
        "blimp": {"mean": accuracy.mean(), "by_set": accuracy.to_dict()},
        **word_similarity(similarity.of_model(model, tokenizer), sets),
        "pronouns": pronouns(model, tokenizer),
    }


def what_it_writes(model, tokenizer) -> dict:
    """Continuations of the prompts, and of those that show how it fails."""
    prompts, failures = (HERE / "prompts.txt").read_text().splitlines(), pd.read_csv(HERE / "failures.csv")
    texts = [continue_text(model, tokenizer, p, **SAMPLE_SETTINGS) for p in [*prompts, *failures["prompt"]]]
    cases = failures.assign(text=texts[len(prompts) :]).to_dict("records")
    return {"samples": texts[: len(prompts)], "failures": cases}


def evaluate(options) -> dict:
    """All figures: of both models, of what they were before the plain text, and of word2vec on as much text."""
    texts, sets = list(open_corpus(options.text).read()), similarity.read_sets(options.lexsim)
    blimp = read_blimp(options.blimp)
    loaded = {name: load(name, "auto") for name in ARCHITECTURE_OF}
    models = {}
    for name, architecture in ARCHITECTURE_OF.items():
        models[name] = training_of(architecture) | what_it_knows(*loaded[name], texts, blimp, sets)
        models[name] |= what_it_writes(*loaded[name])
    models["demo"]["roles"] = sense_roles(*loaded["demo"], texts, sets)
    figures = {
        "machine": f"{loaded['demo'][0].device.type}, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "text": {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)},
        "blimp_pairs": len(blimp),
        "models": models,
    }
    if options.before:
        figures["before"] = {
            name: what_it_knows(*load(options.before / architecture / "older-exported"), texts, blimp, sets)
            for name, architecture in ARCHITECTURE_OF.items()
        }
    methods = {
        "Backpack": similarity.of_model(*loaded["demo"]),
        "Backpack's input embedding": similarity.of_input_embeddings(*loaded["demo"]),
        "Transformer": similarity.of_model(*loaded["demo-transformer"]),
    }
    if options.older and options.corpus:
        read = models["demo"]["bytes_of"]
        characters = {options.older: read["older"], options.corpus: read["plain"]}
        methods["word2vec"] = of_word2vec(characters, loaded["demo"][0].config.n_embd)
        figures["word2vec"] = {"characters": sum(read.values())} | word_similarity(methods["word2vec"], sets)
    figures["similarity_differences"] = similarity.paired_differences(methods, sets).reset_index().to_dict("records")
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="text that was not trained on: paths or globs")
    parser.add_argument("--lexsim", required=True, help="folder or URL of the word similarity sets")
    parser.add_argument("--blimp", default="nyu-mll/blimp", help="folder of BLiMP's .jsonl files, or a hub id")
    parser.add_argument("--older", help="the older training text, for word2vec; left out without it")
    parser.add_argument("--corpus", help="the plain training text, likewise")
    parser.add_argument("--before", type=Path, help="the runs of make.py, to measure what the older text alone gave")
    keep_freed_memory()
    measured = json.loads(json.dumps(evaluate(parser.parse_args())), parse_constant=lambda _: None)  # NaN is no JSON
    write_text(HERE / "evaluation.json", json.dumps(measured, indent=1) + "\n")
    write_cards()


if __name__ == "__main__":
    main()
