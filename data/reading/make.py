"""Makes every stored table of 06_reading, from the demo model and from the small models that `models.py` trained.

    python data/reading/make.py --corpus "corpus/simple-*.txt.xz" --valid corpus/simple-valid.txt.xz --lexsim lexsim

Ships `seed-0` to `seed-2` here, in half precision, and writes a CSV for each table. `--demo-only` renews the tables of
the demo model, which need none of the small ones.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import pandas as pd
import torch

from backpack_lib.analysis import similarity
from backpack_lib.analysis.bigrams import Bigrams
from backpack_lib.analysis.finetuning import rows_of_texts
from backpack_lib.analysis.roles import persons_and_pronouns, relations_of_text
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.files import data_folder, exit_status, runs_folder, write_text
from backpack_lib.lessons.opening import open_lesson
from backpack_lib.lessons.reading import professions_and_templates, words_to_compare
from backpack_lib.loading import export, fingerprint, load
from backpack_lib.studies import reading_study as study
from backpack_lib.text.corpora import first_characters, open_corpus

HERE = Path(__file__).resolve().parent
SHIPPED, TRANSFORMERS = ("seed-0", "seed-1", "seed-2"), ("transformer-0", "transformer-1")
VALID_CHARACTERS, COUNTED_CHARACTERS, ROLE_CHARACTERS = 40_000, 30_000_000, 3_000_000
DIGITS = 5


def save(table: pd.DataFrame, name: str):
    write_text(HERE / f"{name}.csv", table.round(DIGITS).to_csv(index=False))


def valid_rows(model, tokenizer, valid: str) -> list[list[int]]:
    """Held-out paragraphs, spread over the file, cut to what the model reads."""
    texts = [text for text in open_corpus(valid).read() if len(text) > 200]
    step = max(1, len(texts) // (VALID_CHARACTERS // 500))
    return rows_of_texts(model, tokenizer, [text[:500] for text in texts[::step]])


def bigrams_of(tokenizer, corpus: str) -> Bigrams:
    """Bigrams counted on the first characters of the text that the models were trained on."""
    texts = first_characters(open_corpus(corpus).read(), COUNTED_CHARACTERS)
    end = tokenizer.eos_token_id
    rows = ([end, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]] for text in texts)
    return Bigrams(rows, len(tokenizer))


def tables_of_demo(corpus: str, valid: str):
    """Explanations, and the bigram part, on held-out text by people."""
    lesson = open_lesson("06_reading")
    rows = valid_rows(lesson.model, lesson.tokenizer, valid)
    weights = fingerprint(lesson.model)
    save(study.explanation_table(lesson.model, rows, lesson.common).assign(weights=weights), "explanations")
    bigrams = study.bigram_table({"demo": lesson.model}, rows, bigrams_of(lesson.tokenizer, corpus))
    save(bigrams.rename_axis("of").reset_index().assign(weights=weights), "bigrams_of_demo")


def tables_of_seeds(valid: str, runs: Path):
    """Likeness, roles and gender across seeds; and Transformers."""
    loaded = {name: load(HERE / name) for name in SHIPPED}
    tokenizer = loaded[SHIPPED[0]][1]
    backpacks = {name: model for name, (model, _) in loaded.items()}
    tokens, among = words_to_compare(tokenizer)
    table, partners = study.seeds_table(backpacks, tokens, among)
    transformers = {name: load(runs / name / "model")[0] for name in TRANSFORMERS}
    others, _ = study.seeds_table(transformers, tokens, among)
    save(pd.concat([table.assign(what="senses"), others.assign(what="Transformer's embeddings")]), "seeds")
    pairs = relations_of_text(tokenizer, first_characters(open_corpus(valid).read(), ROLE_CHARACTERS))
    roles = study.roles_table(backpacks, pairs)
    people = pd.read_csv(data_folder() / "professions.csv")["profession"]
    true, false = persons_and_pronouns(tokenizer, people)
    persons = study.roles_table(backpacks, {"pronoun of a person": true}, false_pairs={"pronoun of a person": false})
    roles = pd.concat([roles, persons], ignore_index=True)
    save(roles, "roles")
    save(study.returning_roles(roles, partners), "returning")
    save(study.gender_table(backpacks, tokenizer, *professions_and_templates(), partners), "gender")


def tables_of_bigrams(corpus: str, valid: str, runs: Path):
    """The bigram part over training, by frequency, and by sense, of the first small model."""
    small, tokenizer = load(HERE / "seed-0")
    counted = bigrams_of(tokenizer, corpus)
    rows = valid_rows(small, tokenizer, valid)
    folders = sorted((runs / "seed-0").glob("model-*"))
    models = ((int(folder.name.split("-")[1]), load(folder)[0]) for folder in folders)
    tables = [study.bigram_table({step: model}, rows, counted) for step, model in models]
    save(pd.concat(tables).rename_axis("step").reset_index(), "bigrams_over_training")
    save(study.frequency_table(small, rows, counted).reset_index(), "bigrams_by_frequency")
    tokens, among = words_to_compare(tokenizer)
    save(study.correlation_table(small, counted, tokens, among).reset_index(), "bigrams_by_sense")


def similarity_by_k(loaded: dict, lexsim: str) -> pd.DataFrame:
    """How well each model's senses agree with people on word similarity: held-out rho, mean over the sets.

    Beside it, how much better the first model does, on the same pairs (with its 95 % interval).
    """
    sets = similarity.read_sets(lexsim)
    methods = {name: similarity.of_model(model, tokenizer) for name, (model, tokenizer) in loaded.items()}
    table = pd.DataFrame(
        {"similarity": {n: similarity.held_out_table(m, sets)["rho"].mean() for n, m in methods.items()}}
    )
    better = similarity.paired_differences(methods, sets).xs("mean", level="set")
    first = next(iter(methods))
    return table.join(better.rename(columns={"difference": f"{first} better by"}))


def table_of_k(valid: str, runs: Path, lexsim: str):
    """Loss and word similarity of the small models by their number of senses."""
    texts = list(islice((text for text in open_corpus(valid).read() if len(text) > 200), 200))
    loaded = {name: load(runs / name / "model") for name in ("seed-0", "senses-4", "senses-1", "transformer-0")}
    rows = {
        name: {
            "senses": getattr(model.config, "num_senses", 0),
            "parameters": sum(p.numel() for p in model.parameters()),
            "bits per byte": bits_per_byte(model, tokenizer, texts),
        }
        for name, (model, tokenizer) in loaded.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index").join(similarity_by_k(loaded, lexsim))
    save(table.rename_axis("model").reset_index(), "senses")


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
        tables_of_demo(options.corpus, options.valid)
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
