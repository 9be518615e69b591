"""Measures the demo model and its baseline, and writes what it found into this folder.

    python data/demo/evaluate.py --text simple-valid.txt.xz --lexsim lexsim \\
        --older "part-*.txt.xz" --corpus "simple-*.txt.xz" --before runs/demo

`evaluation.json` holds every figure; each model's card is written from it by `cards.py`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cards import ARCHITECTURE_OF, write_cards
from evidence import of_word2vec, profession_pronouns, related_words
from make import HERE, recipe

from backpack_lib import load
from backpack_lib.analysis import roles, similarity
from backpack_lib.analysis.bias import fill, ratio, tokens_of_pair
from backpack_lib.analysis.scores import bits_per_byte, blimp_accuracy, next_log_probabilities, read_blimp
from backpack_lib.analysis.statistics import bootstrap_intervals
from backpack_lib.files import exit_status, write_text
from backpack_lib.lessons.bias import rank_correlation
from backpack_lib.loading import fingerprint
from backpack_lib.text.corpora import first_characters, open_corpus, prepare
from backpack_lib.text.writing import continue_text
from backpack_lib.training.build import keep_freed_memory
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

TIMED_STEPS, TIMED_TOKENS, TIMES = 20, 200, 3
RELATED = 7.0  # of ten: from this score on, two words are related
SAMPLE_SETTINGS = {"top_p": 0.8, "temperature": 0.9, "repetition_penalty": 1.2, "max_new_tokens": 60}
PEOPLE = """man woman boy girl king queen prince princess mother father husband wife son daughter brother sister
            actor actress director singer doctor professor player artist author""".split()


def pronouns(model, tokenizer, professions: pd.DataFrame) -> dict:
    """How likely "he" and "she" are after a profession, and how truly to the world the model ties them to it.

    All over the templates on which 04_gender_bias measures, which nothing is fitted to. mass: mean of p(he) + p(she);
    ratio: mean of the likelier of the two over the other; rho: Spearman's, of log p(he)/p(she) and the share of men,
    with the 95 % interval over professions and templates.
    """
    templates = json.loads((HERE.parent / "prompts.json").read_text())["english"]["test"]
    names = list(professions["profession"])
    log_p = next_log_probabilities(model, tokenizer, fill(tokenizer, names, templates))
    log_p = log_p[:, list(tokens_of_pair(tokenizer, ("he", "she")))].view(len(names), len(templates), 2)
    odds = (log_p[..., 0] - log_p[..., 1]).cpu().numpy()
    men = np.broadcast_to(100 - professions["percent_women"].to_numpy()[:, None], odds.shape)
    low, high = bootstrap_intervals(rank_correlation, odds, men)
    found = {"rho": rank_correlation(odds, men), "rho_low": low, "rho_high": high, "ratio": ratio(odds)}
    return {"mass": log_p.exp().sum(-1).mean().item()} | {name: float(value) for name, value in found.items()}


# ---------------------------------------------------------------- speed


def generation_speed(model) -> float:
    """Tokens per second of one text of `TIMED_TOKENS` tokens with a cache, the median of `TIMES` after a warm-up."""
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    seconds = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        model.generate(
            ids, attention_mask=ids, min_new_tokens=TIMED_TOKENS, max_new_tokens=TIMED_TOKENS, do_sample=False
        )
        seconds.append(time.perf_counter() - began)
    return TIMED_TOKENS / statistics.median(seconds[1:])


def training_speed(name: str, blocks, device: str) -> float:
    """Tokens per second of `TIMED_STEPS` training steps at the recipe's settings, after as many for warming up."""
    settings = recipe(device)["plain"] | {
        "steps": 2 * TIMED_STEPS,
        "eval_every": TIMED_STEPS,
        "eval_blocks": 1,
        "warmup": 1,
    }
    with tempfile.TemporaryDirectory() as out:
        history = train(
            TrainingConfig(corpus="planted", out=out, architecture=ARCHITECTURE_OF[name], device=device, **settings),
            blocks,
        )
    return history["tokens_per_second"].iloc[-1]


# ---------------------------------------------------------------- everything


def sense_roles(model, tokenizer, texts: list[str], sets: dict[str, pd.DataFrame], professions: pd.DataFrame) -> dict:
    """The evidence for what each sense does; see `roles.py`."""
    verbs = sorted({*sets["SimVerb-3500"]["word1"]}) if "SimVerb-3500" in sets else []
    pairs = roles.relations_of_text(tokenizer, texts, verbs)
    if "WS-353" in sets:
        pairs["related word"] = related_words(tokenizer, sets["WS-353"], RELATED)
    people = [*professions["profession"], *PEOPLE]
    auc, untrained, consistency = roles.evidence(model, tokenizer, pairs, people)
    return {
        "auc": auc.to_dict("list"),
        "auc_untrained": untrained.to_dict("list"),
        "consistency": consistency.T.to_dict(),
        "pairs": {
            name: len(rows)
            for name, rows in (pairs | {roles.PERSONS: roles.persons_and_pronouns(tokenizer, people)[0]}).items()
        },
        "pronouns": profession_pronouns(model, tokenizer, professions).to_dict("list"),
    }


def word_similarity(senses_of, sets: dict[str, pd.DataFrame]) -> dict:
    """Every similarity on every set, and how well the best of them does where it was not picked."""
    return {
        "similarity": similarity.similarity_table(senses_of, sets).to_dict(),
        "similarity_held_out": similarity.held_out_table(senses_of, sets).to_dict("index"),
    }


def word2vec(characters: dict[str, int], width: int, seed: int = 0):
    """gensim's skip-gram with negative sampling, five passes over the first so many characters of each corpus.

    Its two workers race, so its figures differ by a hair from run to run.
    """
    from gensim.models import Word2Vec
    from gensim.utils import simple_preprocess

    words = [
        simple_preprocess(text)
        for corpus, most in characters.items()
        for text in first_characters(open_corpus(corpus).read(), most)
    ]
    made = Word2Vec(words, vector_size=width, window=5, min_count=5, sg=1, negative=5, epochs=5, workers=2, seed=seed)
    return made.wv


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


def what_it_knows(model, tokenizer, texts: list[str], blimp, sets, professions) -> dict:
    """How well a model predicts text and grammar, how alike it finds words, and which pronouns it expects."""
    accuracy = blimp_accuracy(model, tokenizer, blimp)
    return {
        "weights": fingerprint(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_byte": bits_per_byte(model, tokenizer, texts),
        "bits_per_byte_of_a_tenth": bits_per_byte(model, tokenizer, texts[::10]),  # quick to measure again
        "blimp": {"mean": accuracy.mean(), "by_set": accuracy.to_dict()},
        **word_similarity(similarity.of_model(model, tokenizer), sets),
        "pronouns": pronouns(model, tokenizer, professions),
    }


def evaluate_model(name: str, texts: list[str], blimp, sets, professions, blocks, device: str) -> dict:
    """Every figure of one model."""
    model, tokenizer = load(name, device=device)

    def continued(prompts):
        return [continue_text(model, tokenizer, prompt, **SAMPLE_SETTINGS) for prompt in prompts]

    failures = pd.read_csv(HERE / "failures.csv")
    found = {
        **training_of(ARCHITECTURE_OF[name]),
        **what_it_knows(model, tokenizer, texts, blimp, sets, professions),
        "generation_tokens_per_second": generation_speed(model),
        "training_tokens_per_second": training_speed(name, blocks, device),
        "samples": continued((HERE / "prompts.txt").read_text().splitlines()),
        "failures": failures.assign(text=continued(failures["prompt"])).to_dict("records"),
    }
    if name == "demo":
        found["roles"] = sense_roles(model, tokenizer, texts, sets, professions)
    return found


def evaluate(given) -> dict:
    """All figures: of both models, of what they were before the plain text, and of word2vec on as much text."""
    text = open_corpus(given.text)
    texts, sets, blimp = list(text.read()), similarity.read_sets(given.lexsim), read_blimp(given.blimp)
    professions = pd.read_csv(HERE.parent / "professions.csv")
    settings, (_, tokenizer) = recipe(given.device)["plain"], load("demo")
    blocks = prepare(text, settings["block_size"], tokenizer=tokenizer)
    found = {
        "machine": f"{given.device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "text": {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts)},
        "blimp_pairs": len(blimp),
        "models": {},
    }
    for name in ARCHITECTURE_OF:
        print(f"evaluating {name}", flush=True)
        found["models"][name] = evaluate_model(name, texts, blimp, sets, professions, blocks, given.device)
    if given.before:
        print("evaluating what they were before the plain text", flush=True)
        found["before"] = {
            name: what_it_knows(*load(given.before / architecture / "older-exported"), texts, blimp, sets, professions)
            for name, architecture in ARCHITECTURE_OF.items()
        }
    if given.older and given.corpus:
        print("training word2vec", flush=True)
        read = found["models"]["demo"]["bytes_of"]
        vectors = word2vec({given.older: read["older"], given.corpus: read["plain"]}, settings["n_embd"])
        found["word2vec"] = {"characters": sum(read.values()), "words": len(vectors)}
        found["word2vec"] |= word_similarity(of_word2vec(vectors), sets)
        found["similarity_differences"] = similarity_differences(sets, {"word2vec": of_word2vec(vectors)})
    return found


def similarity_differences(sets: dict[str, pd.DataFrame], others: dict) -> list[dict]:
    """How much better the demo's senses know similarity than its input embedding, its Transformer, and others."""
    (backpack, tokenizer), (transformer, _) = load("demo"), load("demo-transformer")
    methods = {
        "Backpack": similarity.of_model(backpack, tokenizer),
        "Backpack's input embedding": similarity.of_input_embeddings(backpack, tokenizer),
        "Transformer": similarity.of_model(transformer, tokenizer),
    }
    return similarity.paired_differences(methods | others, sets).reset_index().to_dict("records")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", required=True, help="text that was not trained on: paths or globs, commas between them"
    )
    parser.add_argument("--lexsim", required=True, help="folder or URL of the word similarity sets")
    parser.add_argument("--blimp", default="nyu-mll/blimp", help="folder of BLiMP's .jsonl files, or a hub id")
    parser.add_argument("--older", help="the older training text, for word2vec; left out without it")
    parser.add_argument("--corpus", help="the plain training text, likewise")
    parser.add_argument("--before", type=Path, help="the runs of make.py, to measure what the older text alone gave")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    def work():
        write_text(HERE / "evaluation.json", json.dumps(evaluate(given), indent=1) + "\n")
        write_cards()

    keep_freed_memory()
    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
