"""Do senses tell the meanings of a word apart? Zero-shot word-sense disambiguation.

An occurrence of a word in a sentence, and each meaning that a dictionary lists for it, are read by the same model and
described in the same way; the meaning that is most alike is the answer. Nothing is trained. Instances and candidates
are those of Raganato et al. (2017) with WordNet's glosses, in two tables; see `read_tables`.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from backpack_lib.analysis.scores import batches
from backpack_lib.text.writing import ids_of_text

WAYS = ("last state", "middle state", "weighted senses", "own senses", "own weights")
PRIORS = (0.1, 0.3, 1.0)  # how much a standard deviation of the similarity counts beside -log of a meaning's number
CHOOSING = "semeval2007"  # the set that a way and a prior are chosen on, and not scored on


def read_tables(folder: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Instances (id, lemma, pos, place, gold, words) and candidates (lemma, pos, number, key, gloss), as `.tsv.xz`."""
    files = (Path(folder) / f"{name}.tsv.xz" for name in ("instances", "candidates"))
    return tuple(pd.read_csv(file, sep="\t", quoting=3, keep_default_na=False) for file in files)


def place_of(tokenizer, words: list[str], place: int, n: int = 1) -> tuple[list[int], int, int]:
    """A sentence's ids, and where its word number `place`, or n words from there on, begin and end among them."""
    ends = [len(ids_of_text(tokenizer, " ".join(words[:end]))) for end in (place, place + n)]
    return ids_of_text(tokenizer, " ".join(words)), *ends


@torch.no_grad()
def describe(model, rows: list[tuple[list[int], int, int]], name: str = "texts") -> dict[str, np.ndarray]:
    """What a model with senses makes of a word in each text, for each of `WAYS`, (n, ...). rows: see `place_of`.

    Means over the places from the word to the end of its text, since only what follows a word has read it: of the last
    and middle states, of o, the weighted sum of all senses, and of the word's own part of it, (d,) or as weights, (k,).
    """
    described = {way: [None] * len(rows) for way in WAYS}
    of_text = defaultdict(list)  # a text is read once, whichever of its words are asked for
    for number, (ids, _, _) in enumerate(rows):
        of_text[tuple(ids)].append(number)
    texts = list(of_text)
    with tqdm(total=len(texts), desc=name, leave=False) as bar:
        for places, ids, _ in batches(model, [list(text) for text in texts]):
            out = model(ids, output_senses=True, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            for row, text in enumerate(places):
                for number in of_text[texts[text]]:
                    for way, value in zip(WAYS, _of_word(out, row, *rows[number])):
                        described[way][number] = value.float().cpu().numpy()
            bar.update(len(places))
    return {way: np.stack(values) for way, values in described.items()}


def _of_word(out, row: int, ids: list[int], begin: int, end: int) -> tuple[torch.Tensor, ...]:
    """The five descriptions of the word at `begin` to `end` in one row of what the model returned."""
    after, middle = slice(begin, len(ids)), out.hidden_states[len(out.hidden_states) // 2]
    alpha, senses = out.contextualization[row, :, after], out.senses[row]  # (k, m, T), (k, T, d)
    own = alpha[..., begin:end].mean(1)  # (k, tokens of the word)
    return (
        out.hidden_states[-1][row, after].mean(0),
        middle[row, after].mean(0),
        (alpha.mean(1, keepdim=True) @ senses)[:, 0].sum(0),
        torch.einsum("kt,ktd->d", own, senses[:, begin:end]),
        own.sum(1),
    )


def similarities(model, tokenizer, instances: pd.DataFrame, candidates: pd.DataFrame) -> Iterator[dict]:
    """For each instance: which of its candidates are right, (m,), and by each way how alike they are, (m,)."""
    known = pd.MultiIndex.from_frame(candidates[["lemma", "pos"]])
    asked = pd.MultiIndex.from_frame(instances[["lemma", "pos"]])
    meanings = candidates[known.isin(asked)].reset_index(drop=True)
    glosses = [f"{lemma.replace('_', ' ')}: {gloss}" for lemma, gloss in zip(meanings["lemma"], meanings["gloss"])]
    words = [lemma.count("_") + 1 for lemma in meanings["lemma"]]
    of_meanings = describe(model, [place_of(tokenizer, g.split(), 0, n) for g, n in zip(glosses, words)], "glosses")
    sentences = zip(instances["words"], instances["place"])
    of_instances = describe(model, [place_of(tokenizer, s.split(" "), place) for s, place in sentences], "sentences")
    rows_of = meanings.groupby(["lemma", "pos"]).indices
    for number, instance in enumerate(instances.itertuples()):
        here = rows_of.get((instance.lemma, instance.pos))
        if here is None:  # no meaning of it is listed, so none can be right
            yield {"right": np.array([False])} | {way: np.zeros(1) for way in WAYS}
            continue
        alike = {"right": meanings["key"].iloc[here].isin(instance.gold.split()).to_numpy()}
        for way in WAYS:
            one, others = of_instances[way][number], of_meanings[way][here]
            alike[way] = others @ one / (np.linalg.norm(others, axis=1) * np.linalg.norm(one) + 1e-9)
        yield alike


def answers(alike: dict, rng: np.random.Generator) -> dict[str, bool]:
    """Whether each method's answer is right: by chance, the first meaning, each way, and each with each prior.

    Meanings stand in the order of their frequency, so ties are broken at random: the first of equals would look good.
    """
    m = len(alike["right"])
    prior, shuffled = -np.log(np.arange(1, m + 1)), rng.permutation(m)
    scores = {"chance": np.zeros(m), "first meaning": prior}
    for way in WAYS:
        z = (alike[way] - alike[way].mean()) / (alike[way].std() + 1e-9)
        scores[way] = z
        scores |= {f"{way}, prior {share:g}": prior + share * z for share in PRIORS}
    return {name: bool(alike["right"][shuffled[score[shuffled].argmax()]]) for name, score in scores.items()}
