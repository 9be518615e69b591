"""What the senses of a model do, found by asking which pairs of words each sense ties together.

A relation is a list of pairs (x, y): y continues x's word, follows x, is the object of the verb x,
and so on. A sense holds a relation if it pushes true partners more than false ones: the AUC is the
chance that C(x)_l . E_y is greater for a true pair than for a false one. False pairs are the true ones
with their y shuffled, so how frequent a word is, or of what kind, cannot explain an AUC. For pronouns,
where most y fit most x, they are other words x with the same y.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from scipy.stats import mannwhitneyu

from backpack_lib.analysis.senses import vectors_of_tokens
from backpack_lib.text.words import tokens_of_word

PAIRS_AT_MOST = 20_000  # of a relation
PRONOUNS = {"he", "him", "his", "himself", "she", "her", "hers", "herself"}
PERSONS = "pronoun of a person"
PEOPLE = """man woman boy girl king queen prince princess mother father husband wife son daughter brother sister
            actor actress director singer doctor professor player artist author""".split()  # beside professions
DETERMINERS = {"the", "a", "an", "his", "her", "its", "their", "this", "that"}
NEARBY = range(2, 11)  # tokens ahead
COMMONEST = 150  # tokens that follow everything, and say nothing of what a text is about
PAIRS_OF_A_WORD = 5  # at least, for a word to count
PERMUTATIONS = 200
MIN_AUC = 0.6  # from here on a sense holds a relation; from 1 - .6 down it holds against it


def relations_of_text(tokenizer, texts: Iterable[str], verbs: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Pairs of token ids, (n, 2), for each relation that the text shows.

    verbs: base forms; what stands after a verb and a determiner is its object more often than not.
    """
    names = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    is_word = np.array([bool(re.fullmatch("Ġ[A-Za-z]+", name)) for name in names])
    is_piece = np.array([bool(re.fullmatch("[a-z]+", name)) for name in names])
    of_verbs = single_tokens(tokenizer, [form for verb in verbs for form in _forms(verb)])
    determiners = single_tokens(tokenizer, DETERMINERS)
    relations = defaultdict(list)
    for text in texts:
        ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=int)
        word, piece = is_word[ids], is_piece[ids]

        def keep(relation, ahead, of_relation):
            pairs = np.stack([ids[:-ahead] if ahead else ids, ids[ahead:]], 1)
            relations[relation].append(pairs[of_relation])

        keep("itself", 0, word)
        keep("rest of the word", 1, word[:-1] & piece[1:])
        keep("next word", 1, word[:-1] & word[1:])
        for ahead in NEARBY:
            keep("words nearby", ahead, word[:-ahead] & word[ahead:])
        keep("object of the verb", 2, np.isin(ids[:-2], of_verbs) & np.isin(ids[1:-1], determiners) & word[2:])
    pairs = {relation: np.concatenate(parts) for relation, parts in relations.items()}
    counts = np.bincount(np.concatenate([rows[:, 1] for rows in pairs.values()]), minlength=len(tokenizer))
    common = counts.argsort()[-COMMONEST:]
    nearby = pairs["words nearby"]
    pairs["words nearby"] = nearby[~np.isin(nearby, common).any(1)]
    return {relation: rows for relation, rows in pairs.items() if len(rows)}


def relation_auc(model, pairs: np.ndarray, false_pairs: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """How well each sense tells true pairs, (n, 2), from false ones: (k,); .5 is chance, 1 is always.

    false_pairs: (m, 2); None shuffles the second words of the true ones.
    """
    if not len(pairs):
        raise ValueError("There are no pairs to tell from false ones; give more text, or other words.")
    if false_pairs is None:
        pairs, false_pairs = _true_and_false(pairs, np.random.default_rng(seed))
    true, false = _scores(model, *pairs.T), _scores(model, *false_pairs.T)
    return mannwhitneyu(true, false, method="asymptotic").statistic / (len(true) * len(false))


def _true_and_false(pairs: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """At most `PAIRS_AT_MOST` of the pairs, and the same with their second words shuffled."""
    if len(pairs) > PAIRS_AT_MOST:
        pairs = rng.choice(pairs, PAIRS_AT_MOST, replace=False)
    return pairs, np.stack([pairs[:, 0], rng.permutation(pairs[:, 1])], 1)


def persons_and_pronouns(tokenizer, people: Iterable[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Words for persons with each pronoun, and false pairs: as many other words with each pronoun, (n, 2) each."""
    persons, pronouns = single_tokens(tokenizer, people), single_tokens(tokenizer, PRONOUNS)
    words = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{3,}", token)]
    others = np.random.default_rng(seed).choice(np.setdiff1d(words, [*persons, *pronouns]), len(persons), replace=False)
    true, false = (np.stack(np.meshgrid(x, pronouns), -1).reshape(-1, 2) for x in (persons, others))
    return true, false


def evidence(
    model, tokenizer, pairs: dict[str, np.ndarray], people: Iterable[str], seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What is known of the senses' roles: for each relation, and for pronouns of persons, each sense's AUC.

    pairs: from `relations_of_text`, and others of one's own. -> AUCs, senses x relations; the same of senses that were
    not trained, which chance gives; and `consistency`, a row for each relation of text.
    """
    pairs = {relation: rows for relation, rows in pairs.items() if len(rows)}
    persons, others = persons_and_pronouns(tokenizer, people, seed)
    tables = []
    for one in (model, _untrained(model, seed)):
        auc = {relation: relation_auc(one, rows, seed=seed) for relation, rows in pairs.items()}
        if len(persons):
            auc[PERSONS] = relation_auc(one, persons, others)
        tables.append(pd.DataFrame(auc).rename_axis("sense"))
    same = {relation: consistency(model, rows, seed) for relation, rows in pairs.items()}
    return *tables, pd.DataFrame.from_dict(same, orient="index").dropna()


def _untrained(model, seed: int):
    """A model like this one with random weights; of a sense lens, other senses on the same Transformer."""
    base = getattr(model, "base", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = type(model)(model.config) if base is None else type(model)(model.config, base)
    return untrained.eval().to(model.device)


def consistency(model, pairs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Does a sense number mean the same thing for all words, as far as a relation goes?

    For each word with at least `PAIRS_OF_A_WORD` true pairs: how far each of its senses pushes its partners, above what
    it pushes other words' partners. Of the variance of this number within words, the share that lies between senses: 1
    if sense 3 does the same for every word, near 0 if the numbers of senses mean nothing.
    -> share; null, the 95 % quantile of that share when each word's senses are permuted; and words, how many counted.
    """
    rng = np.random.default_rng(seed)
    pairs, false = _true_and_false(pairs, rng)
    margins = pd.DataFrame(_scores(model, *pairs.T) - _scores(model, *false.T)).groupby(pairs[:, 0])
    table = margins.mean()[margins.size() >= PAIRS_OF_A_WORD].to_numpy()
    if len(table) < 2:
        return {"share": np.nan, "null": np.nan, "words": len(table)}
    table = table - table.mean(1, keepdims=True)

    def between(values):
        return len(values) * (values.mean(0) ** 2).sum() / (values**2).sum()

    null = [between(rng.permuted(table, axis=1)) for _ in range(PERMUTATIONS)]
    return {"share": float(between(table)), "null": float(np.quantile(null, 0.95)), "words": len(table)}


def find_roles(auc: pd.DataFrame) -> pd.DataFrame:
    """One line for each sense: the relation in which it stands out most from the other senses, if in any.

    auc: senses x relations. Columns: role, auc, and lead, by how many standard deviations over the senses it
    stands above (or, for a role "against" a relation, below) their mean in that relation. A role needs a lead
    of at least one, and an AUC of at least `MIN_AUC` (at most 1 - `MIN_AUC`).
    """
    lead = (auc - auc.mean()) / auc.std()
    has_role = ((auc >= MIN_AUC) & (lead >= 1)) | ((auc <= 1 - MIN_AUC) & (lead <= -1))
    roles = pd.DataFrame({"role": "no clear role", "auc": np.nan, "lead": np.nan}, index=auc.index)
    for sense in auc.index[has_role.any(axis=1)]:
        relation = lead.loc[sense, has_role.loc[sense]].abs().idxmax()
        against = "against " if lead.at[sense, relation] < 0 else ""
        roles.loc[sense] = against + relation, auc.at[sense, relation], lead.at[sense, relation]
    return roles


@torch.no_grad()
def _scores(model, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """C(x)_l . E_y of pairs of tokens, (n, k)."""
    distinct, inverse = np.unique(x, return_inverse=True)
    senses = vectors_of_tokens(model, torch.from_numpy(distinct).to(model.device))[inverse]
    outputs = model.get_output_embeddings().weight[y]
    return torch.einsum("nkd,nd->nk", senses, outputs).float().cpu().numpy()


def _forms(verb: str) -> list[str]:
    """A verb's base and regular forms: open, opens, opened, opening; hope, hopes, hoped, hoping."""
    stem = verb.removesuffix("e")
    return [verb, verb + "s", stem + "ed", stem + "ing"]


def single_tokens(tokenizer, words: Iterable[str]) -> np.ndarray:
    """Ids of those words that are one token, (n,)."""
    ids = [tokens_of_word(tokenizer, word) for word in words]
    return np.array([tokens[0] for tokens in ids if len(tokens) == 1], dtype=int)
