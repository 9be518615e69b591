"""What 06_reading alone needs: texts and words that suit a model, stored tables, and checks of its exercises."""

import re

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from backpack_lib.analysis.finetuning import rows_of_texts
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import check_function, check_number, random_cases
from backpack_lib.lessons.opening import PLANTED, Lesson
from backpack_lib.text import planted
from backpack_lib.text.corpora import open_corpus
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text

STORED = data_folder() / "reading"
TEXTS, CHARACTERS = 80, 500  # of a corpus: how many, and of each at most


def check_settings(lesson: Lesson, numbers: list[int]):
    """Refuses numbers of words that are out of range, and a text without the example's word."""
    if not numbers or min(numbers) < 1:
        raise ValueError(f"numbers={numbers} should be numbers of words, each at least 1.")
    word, text = lesson.example.word, lesson.example.text
    if token_of_word(lesson.tokenizer, word) not in ids_of_text(lesson.tokenizer, text)[:-1]:
        raise ValueError(f"The text {text!r} does not have {word!r} in it, after a space and before its end.")


def rows_of_corpus(model, tokenizer, corpus: str) -> list[list[int]]:
    """The beginnings of texts that are spread over a corpus, as rows of token ids; short texts are left out."""
    texts = [text for text in open_corpus(corpus).read() if text.strip()]
    texts = [text for text in texts if len(text) > 200] or texts
    every = max(1, len(texts) // TEXTS)
    return rows_of_texts(model, tokenizer, [text[:CHARACTERS] for text in texts[::every]])


def texts_for(lesson: Lesson, transformer=None, reference: str = "", seed: int = 0) -> tuple[list[list[int]], str]:
    """Held-out texts as rows of token ids, and what they are: by people, planted, or written by one of the models."""
    if reference:
        return rows_of_corpus(lesson.model, lesson.tokenizer, reference), "text by people"
    texts, source = lesson.texts("", planted.generate(TEXTS, seed + 9000), [""] * 24, 60, seed, transformer)
    if lesson.kind != PLANTED and transformer is not None:
        source = "texts that its Transformer wrote"
    return rows_of_texts(lesson.model, lesson.tokenizer, texts), source


def words_to_compare(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The 300 commonest whole words, to compare models on, and 1,000 whose pushes are compared, by the vocabulary."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ids = [i for i, name in enumerate(names) if re.fullmatch("Ġ[A-Za-z]{3,}", name)]
    return torch.tensor(ids[:300]), torch.tensor(ids[:1000])


# ---------------------------------------------------------------- exercises


def check_features(answer) -> str:
    """answer: (E (V, d), up (n,), down (n,)) -> the mean embedding of the words up, less that of the words down."""
    cases = [(E, torch.tensor([1, 4, 7]), torch.tensor([0, 2])) for (E,) in random_cases("Vd", V=(20, 20), d=(3, 5))]
    return check_function(answer, lambda E, up, down: E[up].mean(0) - E[down].mean(0), cases)


def check_replaced(answer) -> str:
    """answer: (o (T, d), alpha (T, T), old (T, d), new (T, d)) -> the states with one sense replaced, (T, d)."""
    cases = random_cases("Td TT Td Td", T=(4, 4), d=(3, 5))
    return check_function(answer, lambda o, alpha, old, new: o + alpha @ (new - old), cases)


def check_parts(answer, contributions: torch.Tensor) -> str:
    """The share of the last token's senses in a logit, from contributions (T, k)."""
    own, others = contributions[-1].sum().item(), contributions[:-1].sum().item()
    hints = [(others, "that is what all other tokens contribute."), (own + others, "that is the whole logit.")]
    return check_number(answer, own, hints, 2e-3)


def check_bigram(answer) -> str:
    """answer: (counts (V,), unigram (V,), discount) -> p(y | x) with absolute discounting."""

    def reference(counts, unigram, discount):
        total = counts.sum()
        return (counts - discount).clamp(min=0) / total + discount * (counts > 0).sum() / total * unigram

    unigram = torch.tensor([0.5, 0.2, 0.2, 0.1])
    cases = [(torch.tensor(counts), unigram, 0.75) for counts in ([3.0, 1, 0, 0], [1.0, 1, 1, 7])]
    return check_function(answer, reference, cases)


def check_assignment(answer) -> str:
    """answer: table (k, k) -> the mean likeness of the best assignment."""
    rng = np.random.default_rng(0)
    cases = [(rng.normal(size=(k, k)),) for k in (3, 6)]
    return check_function(answer, lambda table: table[linear_sum_assignment(-table)].mean(), cases)
