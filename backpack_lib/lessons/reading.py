"""What 06_reading alone needs: texts and words that suit a model, stored tables, given explanations, exercises."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.bigrams import Bigrams, losses_by_part
from backpack_lib.analysis.explanations import recovered
from backpack_lib.analysis.finetuning import rows_of_texts
from backpack_lib.analysis.matching import match
from backpack_lib.analysis.senses import pushed_most
from backpack_lib.files import as_seen, data_folder, first_line
from backpack_lib.lessons.exercises import check_choice, check_function, check_number
from backpack_lib.lessons.opening import PLANTED, Lesson, check_stored
from backpack_lib.loading import load
from backpack_lib.model.kinds import check_sense
from backpack_lib.studies.reading_study import MEAN, SAID, bigram_table, choosing_table
from backpack_lib.text import planted
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.words import spell, token_of_word, tokens_of_word
from backpack_lib.text.writing import continue_texts, ids_of_text
from backpack_lib.training.config import TrainingConfig
from backpack_lib.training.run import train

WRITTEN, TOKENS, CHARACTERS = 24, 60, 60_000  # texts that a model writes, their tokens; of text by people
EXPLAINED = 20  # common words that a language model explains, beside the example
PARTS = ("model", "last token", "last token, renormalised")
COUNTED = 20_000  # planted texts in which bigrams are counted: those that 01 trains on
STORED = data_folder() / "reading"
SMALL = ("seed-0", "seed-1", "seed-2")
PLANTED_RUN = dict(
    corpus="planted", n_layer=2, n_head=4, n_embd=64, vocab_size=1200, block_size=64, batch_size=16, steps=300,
    learning_rate=8e-3, eval_every=300, save_every=300, eval_blocks=64, precision="fp32",
)  # fmt: skip


# ---------------------------------------------------------------- texts and words


def texts_for(lesson: Lesson, transformer=None, reference: str = "", seed: int = 0) -> tuple[list[list[int]], str]:
    """Held-out texts as rows of tokens, and what they are: by people, planted, or written by one of the models."""
    if reference:
        paragraphs = first_characters(open_corpus(reference).read(), CHARACTERS)
        texts, source = [text for text in paragraphs if text.strip()], "text by people"
    elif lesson.kind == PLANTED:
        texts, source = [text.text for text in planted.generate(80, seed=seed + 9000)], "planted text"
    else:
        net = lesson.model if transformer is None else transformer
        length = min(TOKENS, net.config.n_positions - 1)
        texts = continue_texts(net, lesson.tokenizer, [""] * WRITTEN, length, seed, top_k=0)
        source = "texts that the model wrote" if transformer is None else "texts that its Transformer wrote"
    return rows_of_texts(lesson.model, lesson.tokenizer, texts), source


def counted_rows(tokenizer) -> list[list[int]]:
    """The planted texts in which bigrams are counted, as rows of tokens."""
    end = tokenizer.eos_token_id
    ids = tokenizer([text.text for text in planted.generate(COUNTED)], add_special_tokens=False)["input_ids"]
    return [[end, *row] for row in ids]


def check_settings(numbers: list[int], simulator: str, seeds: list[int], counts_of_senses: list[int], steps: int):
    """Raises ValueError for settings that are out of range."""
    if not numbers or min(numbers) < 1:
        raise ValueError(f"numbers={numbers} should be numbers of words, each at least 1.")
    if simulator not in ("ridge", "size"):
        raise ValueError(f"simulator={simulator!r} is unknown; choose one of ridge, size.")
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds} should be at least two different ones.")
    for k in (*counts_of_senses, 8):
        TrainingConfig(**PLANTED_RUN | _length(steps) | {"num_senses": k}, out="")


def _length(steps: int) -> dict:
    return {"steps": steps, "warmup": steps // 10}


def check_example(lesson: Lesson):
    """Raises ValueError for a word of several tokens, or a text that does not have it in it."""
    if (
        token_of_word(lesson.tokenizer, lesson.example.word)
        not in ids_of_text(lesson.tokenizer, lesson.example.text)[:-1]
    ):
        raise ValueError(
            f"The text {lesson.example.text!r} does not have {lesson.example.word!r} in it, "
            "after a space and before its end."
        )


def people_explanations(source: str, lesson: Lesson) -> dict:
    """Explanations from a file, or by a language model in a folder, of the example's word and some common words."""
    source = as_seen(source)
    if source and Path(source).is_dir():
        words = [lesson.example.word, *spell(lesson.tokenizer, lesson.common[:EXPLAINED].tolist())]
        target = lesson.folder / "explanations_by_model.csv"
        source = explanations_by_model(source, lesson.model, lesson.tokenizer, words, range(lesson.senses), target)
    return given_explanations(source, lesson.tokenizer, lesson.model)


def given_explanations(file: str, tokenizer, model) -> dict:
    """Explanations by people: from (token, sense) to lists of tokens up and down. See `data/reading/README.md`.

    Raises ValueError for a file that cannot be read or lacks a column, and for words of several tokens.
    """
    if not file:
        return {}
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"The explanations in {file!r} cannot be read: {first_line(error)}") from error
    if missing := [column for column in ("word", "sense", "up", "down") if column not in table]:
        raise ValueError(f"{file!r} lacks the column {missing[0]!r}; it should have word, sense, up and down.")
    found = {}
    for row in table.itertuples():
        if not row.sense.isdigit():
            raise ValueError(f"{file!r}: sense={row.sense!r} of {row.word!r} is no number.")
        key = token_of_word(tokenizer, row.word), check_sense(model, int(row.sense))
        found[key] = tuple([token_of_word(tokenizer, word) for word in words.split()] for words in (row.up, row.down))
    return found


def explanations_by_model(folder: str, model, tokenizer, words: list[str], senses, target: Path, shown: int = 8) -> str:
    """Explanations by a language model on this machine: it continues the list of the words that a sense pushes up.

    folder: a causal model that transformers can load. Writes a file as `given_explanations` reads it, and returns its
    name. What it says below is that of the sense's own list, since no model lists what does not belong.
    """
    writer, its_tokenizer = load(folder)
    rows = []
    for word in words:
        token = torch.tensor([token_of_word(tokenizer, word)], device=model.device)
        up, _, down, _ = pushed_most(model, model.sense_vectors(token)[0], shown)
        for sense in senses:
            names = [name for name in spell(tokenizer, up[sense].tolist()) if name.isalpha()]
            prompt = f"These words belong together: {', '.join(names)},"
            (text,) = continue_texts(writer, its_tokenizer, [prompt], 30, do_sample=False)
            said = [
                one for one in re.findall(r"[A-Za-z]+", text[len(prompt) :]) if len(tokens_of_word(tokenizer, one)) == 1
            ]
            below = [name for name in spell(tokenizer, down[sense].tolist()) if name.isalpha()]
            below = [one for one in below if len(tokens_of_word(tokenizer, one)) == 1]
            if said:
                rows.append((word, sense, " ".join(dict.fromkeys(said)), " ".join(below)))
    pd.DataFrame(rows, columns=["word", "sense", "up", "down"]).to_csv(target, index=False)
    return str(target)


# ---------------------------------------------------------------- small models, shipped or trained here


def small_models() -> tuple[dict, object]:
    """The three small models of real text that are shipped, and their tokenizer."""
    found = {name: load(STORED / name) for name in SMALL}
    return {name: model for name, (model, _) in found.items()}, found[SMALL[0]][1]


def train_planted(folder: Path, device: str, seeds=(0, 1, 2), senses=(1, 16), steps: int = PLANTED_RUN["steps"]):
    """Small Backpacks of planted text: seeds of k = 8, and other k; and two Transformers.

    -> by name, each model and the last row of its history; and their tokenizer
    """
    runs = {f"k = 8, seed {seed}": {"num_senses": 8, "seed": seed} for seed in seeds}
    runs |= {f"k = {k}": {"num_senses": k} for k in senses}
    runs |= {f"Transformer, seed {seed}": {"architecture": "transformer", "seed": seed} for seed in seeds[:2]}
    found = {}
    for name, changes in runs.items():
        config = TrainingConfig(**PLANTED_RUN | _length(steps) | changes, out="", device=device)
        config.out = str(folder / config.key())
        history = train(config)
        model, tokenizer = load(config.out + "/model", device=device)
        found[name] = (model, history.iloc[-1])
    return found, tokenizer


def seeds_of(trained: dict, kind: str) -> dict:
    """The models whose name begins so."""
    return {name: model for name, (model, _) in trained.items() if name.startswith(kind)}


def planted_words(tokenizer) -> torch.Tensor:
    """Tokens of planted words, on which its models are compared."""
    return torch.tensor(planted.tokens_in_use(tokenizer))


def likeness_summary(tables: dict[str, pd.DataFrame], stored: pd.DataFrame) -> pd.DataFrame:
    """Means over pairs of models: matched, random pairs, and null. stored: of Transformers of real text."""
    tables = tables | {"Transformers, real text": stored[stored["what"] != "senses"]}
    return pd.DataFrame(
        {name: table[["matched", "random pairs", "null (95 %)"]].mean() for name, table in tables.items()}
    ).T


# ---------------------------------------------------------------- said in words


def recovered_by_sense(recovered: pd.DataFrame) -> pd.DataFrame:
    """From an `explanation_table`: for each sense the shares that n words and the mean sense recover, and its worth."""
    single = recovered[recovered["sense"] != "all"].assign(sense=lambda table: table["sense"].astype(int))
    by_words = single[single["replaced by"] == SAID].pivot(index="sense", columns="words", values="share")
    table = by_words.rename(columns=number_of_words)
    table[MEAN] = single[single["replaced by"] == MEAN].set_index("sense")["share"]
    return table.assign(worth=single.groupby("sense")["worth"].first())


def number_of_words(n: int) -> str:
    return f"{n} word" if n == 1 else f"{n} words"


def replacement(what: str, n: int) -> str:
    """What a sense was replaced by, for a figure. n: words of the explanation, 0 where there is none."""
    return f"{what}, {number_of_words(n)}" if n else what


# ---------------------------------------------------------------- bigrams


def bigrams_of_model(lesson: Lesson, model: str, rows: list[list[int]]) -> tuple[pd.DataFrame, str]:
    """Losses of a model's parts, beside counted bigrams where there is a text to count: planted, or stored (demo)."""
    stored = stored_for("bigrams_of_demo", model, lesson)
    if stored is not None:
        return stored.set_index("of"), "held-out text by people (stored)"
    if lesson.kind == PLANTED:
        counted = Bigrams(counted_rows(lesson.tokenizer), lesson.model.config.vocab_size)
        return bigram_table({model: lesson.model}, rows, counted), "planted text"
    parts = losses_by_part(lesson.model, rows)
    return pd.DataFrame({model: {part: parts[part].mean() for part in PARTS}}).T, "the texts above"


def settling_finding(losses: pd.Series, whole: pd.Series) -> str:
    """One sentence: whether the last word's part stops to improve before the model does, over training steps."""
    step = settles(losses)
    if step >= losses.index.max():
        return (
            f"The last word's part improves to the end of training ({losses.iloc[-1]:.2f} nats), as the model does "
            f"({whole.iloc[-1]:.2f})"
        )
    return (
        f"By step {step} of {losses.index.max()}, the last word's part is within 0.02 nats of its best; "
        "the model gains "
        f"{whole.loc[step] - whole.iloc[-1]:.2f} nats more after it"
    )


def settles(losses: pd.Series, within: float = 0.02) -> int:
    """The first step from which a loss stays within so many nats of its least."""
    return int(losses.index[(losses[::-1].cummax()[::-1] <= losses.min() + within).to_numpy().argmax()])


def stored_table(name: str) -> pd.DataFrame:
    """A table that `data/reading/make.py` wrote."""
    return pd.read_csv(STORED / f"{name}.csv")


def stored_for(name: str, model: str, lesson: Lesson) -> pd.DataFrame | None:
    """A table that `data/reading/make.py` wrote of the demo model, if this is it."""
    if model != "demo":
        return None
    table = stored_table(name)
    check_stored(table.pop("weights"), lesson, "make reading")
    return table


def professions_and_templates() -> tuple[list[str], list[str]]:
    """The professions, and all templates that end where a pronoun is likely."""
    names = list(pd.read_csv(data_folder() / "professions.csv")["profession"])
    prompts = json.loads((data_folder() / "prompts.json").read_text(encoding="utf-8"))["english"]
    return names, prompts["fit"] + prompts["test"]


def words_to_compare(tokenizer, words: int = 300, among: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole words to compare models on, and words whose pushes are compared: the commonest, by the vocabulary."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ids = [i for i, name in enumerate(names) if re.fullmatch("Ġ[A-Za-z]{3,}", name)]
    return torch.tensor(ids[:words]), torch.tensor(ids[:among])


# ---------------------------------------------------------------- what chooses a sense


def choosing_texts(word: str, seed: int = 0, texts: int = 12) -> list[list[tuple[str, list[str]]]]:
    """Planted texts up to an ambiguous word, with pieces that could stand instead of each of four earlier ones.

    Place 1 is the place, which decides the topic; 2 the person; 3 the verb of speech; 4 the verb.
    """
    lexicon = planted.lexicon()
    rng = np.random.default_rng(seed)
    one, two = lexicon["ambiguous"][word][:2]
    made = []
    for _ in range(texts):
        names = rng.permutation(lexicon["names"]["she"])
        speech, verbs = rng.permutation(lexicon["speech"]), rng.permutation(lexicon["attitudes"])
        here, there = (
            rng.permutation(lexicon["topics"][one]["places"]),
            rng.permutation(lexicon["topics"][two]["places"]),
        )
        made.append([
            ("At the", []), (f" {here[0]}", [f" {p}" for p in there[:2]]),
            (",", []), (f" {names[0]}", [f" {n}" for n in names[1:3]]),
            (f" {speech[0]}", [f" {s}" for s in speech[1:3]]), (" that she", []),
            (f" {verbs[0]}", [f" {v}" for v in verbs[1:3]]), (f" the {word}", []),
        ])  # fmt: skip
    return made


def with_piece(pieces: list[tuple[str, list[str]]], place: int | None = None) -> str:
    """One of `choosing_texts` as it is, or with the first other piece at a place."""
    return "".join(others[0] if number == place else piece for number, (piece, others) in enumerate(pieces))


def weights_moved(model, tokenizer, words: list[str], seed: int = 0) -> pd.DataFrame:
    """How far the weights on a word's own senses move when another of `PLACES` is replaced: (word, text) x places."""
    changes = pd.concat([choosing_table(model, tokenizer, choosing_texts(word, seed), word) for word in words])
    changes["replaced"] = changes["place"].map(PLACES)
    return changes.groupby(["word", "text", "replaced"])["change"].mean().unstack()


def moves_most(moves: pd.DataFrame) -> pd.Series:
    """In what share of the texts of `weights_moved` each of `PLACES` moves the weights most. By chance: one in four."""
    return moves.idxmax(axis=1).value_counts(normalize=True).reindex(list(PLACES.values()), fill_value=0.0)


def middle_half(values: pd.DataFrame) -> pd.DataFrame:
    """For each column its mean and the interval of the middle half of its values, which is widened to hold the mean."""
    mean, low, high = values.mean(), values.quantile(0.25), values.quantile(0.75)
    table = pd.DataFrame({"mean": mean, "low": np.minimum(low, mean), "high": np.maximum(high, mean)})
    return table.sort_values("mean")


PLACES = {1: "place (decides the topic)", 3: "person", 4: "verb of speech", 6: "verb"}


# ---------------------------------------------------------------- exercises


def check_features(answer) -> str:
    """answer: (E (V, d), up (n,), down (n,)) -> the mean embedding of the words up, less that of the words down."""
    draw = torch.Generator().manual_seed(0)
    cases = [(torch.randn(20, d, generator=draw), torch.tensor([1, 4, 7]), torch.tensor([0, 2])) for d in (3, 5)]
    return check_function(answer, lambda E, up, down: E[up].mean(0) - E[down].mean(0), cases)


def check_recovered(answer) -> str:
    """answer: (zero, replaced, original), losses -> the share recovered."""
    cases = [(5.0, 4.0, 3.0), (5.0, 5.5, 3.0), (4.2, 3.9, 3.8)]
    return check_function(answer, lambda *losses: recovered(*(np.array([one]) for one in losses)), cases)


def check_parts(answer, own: float, others: float) -> str:
    """The logit of the target as it is from the last token's senses alone."""
    return check_number(
        answer,
        own,
        [(others, "that is what all other tokens contribute."), (own + others, "that is the whole logit.")],
        2e-3,
    )


def check_bigram(answer) -> str:
    """answer: (counts (V,), unigram (V,), discount) -> p(y | x) with absolute discounting."""

    def reference(counts, unigram, discount):
        total = counts.sum()
        return (counts - discount).clamp(min=0) / total + discount * (counts > 0).sum() / total * unigram

    cases = [
        (torch.tensor(c), torch.tensor([0.5, 0.2, 0.2, 0.1]), 0.75)
        for c in ([3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 7.0])
    ]
    return check_function(answer, reference, cases)


def check_matching_claim(answer) -> str:
    return check_choice(
        answer,
        "c",
        {
            "a": "300 words are enough for a mean with a small error.",
            "b": "the correlation is taken after the mean over words is gone, so that is no objection.",
            "c": "matching takes the best of many pairings, so matched senses look more alike than random pairs "
            "even where numbers mean nothing; the null has to be matched, too.",
            "d": "the Hungarian algorithm finds the best assignment, not just a good one.",
        },
    )


def check_assignment(answer) -> str:
    """answer: table (k, k) -> the mean likeness of the best assignment."""
    rng = np.random.default_rng(0)
    return check_function(answer, lambda table: match(table)[1], [(rng.normal(size=(k, k)),) for k in (3, 6)])


def check_recovered_claim(answer) -> str:
    return check_choice(
        answer,
        "b",
        {
            "a": "the words were chosen among common ones; rarer ones would say less to a reader.",
            "b": "the mean sense, which says nothing about any word, may recover as much: "
            "what counts is the share above it.",
            "c": "texts were drawn again for the interval, which is what an interval needs.",
            "d": "zero ablation is the comparison that the share is defined by.",
        },
    )
