"""How far senses can be read: tables of what explanations recover, of bigrams, of seeds, and of what chooses a sense.

Each function takes models and texts and returns a tidy DataFrame; none prints. Those of 06_reading that take long, or
need text that is not shipped, are stored by `data/reading/make.py`.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from backpack_lib.analysis import bias
from backpack_lib.analysis.bigrams import Bigrams, bigram_correlations, losses_by_part
from backpack_lib.analysis.explanations import Replacement, cross_fitted, explain, recovered_with_interval
from backpack_lib.analysis.matching import compare_models
from backpack_lib.analysis.roles import relation_auc
from backpack_lib.analysis.scores import prompt_batches

ZERO, MEAN, SAID, OTHER = "taken away", "mean sense", "said in words", "another word's words"
OTHER_WORDS = 1000  # beside those of the texts, that simulators are fitted on
FREQUENCY_BINS = (0, 100, 1000, 10_000, np.inf)  # of a token, in the counted text


# ---------------------------------------------------------------- 1. said in words


def explanation_table(
    model, rows: list[list[int]], among: torch.Tensor, ns: Iterable[int] = (1, 3, 10, 30, 100), kind: str = "ridge",
    given=None, seed: int = 0, alone: Iterable[int] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The share of a sense's worth that explanations of n words recover, and the mean sense: one by one, then all.

    rows: texts as token ids. among: the words that explanations are made of. given: from (token, sense) to explanations
    by people, lists of tokens up and down, which take the place of those made here. alone: the senses to replace one by
    one; None: all.

    The null gives each word the longest explanation of another word.

    -> a row for each sense ("all": every sense at once), kind of replacement and n: loss in nats per token; worth, by
    how much taking the sense away raises it; share recovered with its 95 % interval over texts.
    """
    texts = Replacement(model, rows)
    words = among[~torch.isin(among, texts.tokens)]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))[:OTHER_WORDS]
    others = words[order.to(words.device)]
    most = max(ns)
    said, of_others = (explain(model, tokens, most, among) for tokens in (texts.tokens, others))
    if given:
        said = _with_given(said, texts.tokens, given)
    made = {
        (SAID, n): cross_fitted(model, said.first(n), texts.tokens, of_others.first(n), others, kind, seed) for n in ns
    }
    mean = next(iter(made.values()))[1]
    made = {key: vectors for key, (vectors, _) in made.items()}
    made |= {(MEAN, 0): mean, (OTHER, most): made[SAID, most].roll(1, 0)}
    original, count = texts.losses(), sum(texts.counts)
    k = model.config.num_senses
    found = []
    singles = range(k) if alone is None else alone
    for name, senses in tqdm([*((str(l), [l]) for l in singles), ("all", range(k))], desc="senses", leave=False):
        zero = texts.losses(texts.zero(senses))
        found.append((name, ZERO, 0, zero.sum() / count, (zero - original).sum() / count, 0.0, 0.0, 0.0))
        for (what, n), vectors in made.items():
            lost = texts.losses({l: vectors[:, l] for l in senses})
            share = recovered_with_interval(zero, lost, original, seed=seed)
            found.append((name, what, n, lost.sum() / count, (zero - original).sum() / count, *share))
    columns = ["sense", "replaced by", "words", "loss", "worth", "share", "low", "high"]
    return pd.DataFrame(found, columns=columns).assign(original=original.sum() / count)


def _with_given(said, tokens: torch.Tensor, given: dict):
    """Explanations in which some (token, sense) are those that people gave, repeated to the length of the others."""
    up, down = said.up.clone(), said.down.clone()
    for (token, sense), (more, less) in given.items():
        for place in (tokens == token).nonzero().flatten().tolist():
            for table, words in ((up, more), (down, less)):
                if words:
                    repeated = (list(words) * table.shape[-1])[: table.shape[-1]]
                    table[place, sense] = torch.tensor(repeated, device=table.device)
    return type(said)(up, down)


# ---------------------------------------------------------------- 2. as bigrams


def bigram_table(models: dict, rows: list[list[int]], bigrams: Bigrams) -> pd.DataFrame:
    """Mean loss by all tokens, by the last token alone, and of counted bigrams: a row for each name in `models`."""
    found = {}
    for name, model in models.items():
        losses = losses_by_part(model, rows)
        last, nexts = losses.pop("last"), losses.pop("next")
        found[name] = {part: values.mean() for part, values in losses.items()}
        found[name]["counted bigrams"] = -bigrams.of_pairs(last, nexts).mean()
        found[name]["counted words"] = -np.log(bigrams.unigram[nexts]).mean()
    return pd.DataFrame.from_dict(found, orient="index")


def frequency_table(model, rows: list[list[int]], bigrams: Bigrams) -> pd.DataFrame:
    """`bigram_table` of one model by how often the last token stands in the counted text."""
    losses = losses_by_part(model, rows)
    last, nexts = losses.pop("last"), losses.pop("next")
    table = pd.DataFrame(losses).assign(**{"counted bigrams": -bigrams.of_pairs(last, nexts)})
    names = ["below 100", "100 to 1,000", "1,000 to 10,000", "10,000 and more"]
    table["last token is met"] = pd.cut(bigrams.of_x[last], FREQUENCY_BINS, right=False, labels=names)
    means = table.groupby("last token is met", observed=True).mean()
    return means.assign(tokens=table.groupby("last token is met", observed=True).size())


def correlation_table(model, bigrams: Bigrams, tokens: torch.Tensor, among: torch.Tensor) -> pd.DataFrame:
    """For each sense, the rank correlation of its pushes with counted bigrams, and with those of another word."""
    rho, null = bigram_correlations(model, bigrams, tokens, among)
    return pd.DataFrame({"own bigrams": rho, "another word": null}).rename_axis("sense")


# ---------------------------------------------------------------- 3. across seeds


def seeds_table(models: dict, tokens: torch.Tensor, among: torch.Tensor, seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Of each pair of models, how alike matched and random senses are, and the null. -> table, partners by pair."""
    names, rows, partners = list(models), [], {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found = compare_models(models[a], models[b], tokens, among, seed)
            partners[a, b] = found["partners"]
            rows.append(
                (a, b, found["matched"], found["random"], found["null"], found["p"], found["table"].max(1).mean())
            )
    columns = ["one", "other", "matched", "random pairs", "null (95 %)", "p", "best partner"]
    return pd.DataFrame(rows, columns=columns), partners


def roles_table(
    models: dict, pairs: dict[str, np.ndarray], seed: int = 0, false_pairs: dict | None = None
) -> pd.DataFrame:
    """AUC of each sense in each relation, for several models: model, relation, sense, auc. See `roles.relation_auc`."""
    rows = [
        (name, relation, sense, auc)
        for name, model in models.items()
        for relation, some in pairs.items()
        for sense, auc in enumerate(relation_auc(model, some, (false_pairs or {}).get(relation), seed))
    ]
    return pd.DataFrame(rows, columns=["model", "relation", "sense", "auc"])


def returning_roles(roles: pd.DataFrame, partners: dict) -> pd.DataFrame:
    """Does the sense that is best for a relation in one model have as its partner the best one in another?

    -> a row for each relation and pair of models: the two best senses, their AUCs, and whether they are partners.
    """
    best = roles.loc[roles.groupby(["model", "relation"])["auc"].idxmax()].set_index(["relation", "model"])
    rows = []
    for relation in roles["relation"].unique():
        for (a, b), partner in partners.items():
            one, other = best.loc[(relation, a)], best.loc[(relation, b)]
            same = int(partner[int(one["sense"])]) == int(other["sense"])
            rows.append((relation, a, b, int(one["sense"]), int(other["sense"]), one["auc"], other["auc"], same))
    return pd.DataFrame(
        rows, columns=["relation", "one", "other", "sense", "other sense", "auc", "other auc", "partners"]
    )


def gender_table(
    models: dict, tokenizer, professions: list[str], templates: list[str], partners: dict, pair=bias.PAIR
) -> pd.DataFrame:
    """Which sense carries most of the differences between professions in each model; are they partners?"""
    top, share = {}, {}
    for name, model in models.items():
        split = bias.split_odds(model, tokenizer, professions, templates, pair)
        shares = bias.shares(split.odds, split.own)
        top[name], share[name] = int(shares.argmax()), float(shares.max())
    rows = [
        (a, b, top[a], top[b], share[a], share[b], int(partner[top[a]]) == top[b])
        for (a, b), partner in partners.items()
    ]
    return pd.DataFrame(rows, columns=["one", "other", "sense", "other sense", "share", "other share", "partners"])


# ---------------------------------------------------------------- 5. what chooses the sense


@torch.inference_mode()
def choosing_table(model, tokenizer, texts: list[list[tuple[str, list[str]]]], word: str) -> pd.DataFrame:
    """How the weights on a word's senses change when one earlier word of a text is replaced.

    texts: each a list of (piece, pieces that could stand there instead), whose last piece ends in the word; pieces
    without others stay. -> a row for each text, place and substitute: change, the sum over senses of how far the weight
    of the word's own senses moves at its own place.
    """
    prompts, places = [], []
    for number, pieces in enumerate(texts):
        whole = [piece for piece, _ in pieces]
        prompts.append("".join(whole))
        places.append((number, -1, ""))
        for place, (_, others) in enumerate(pieces):
            for other in others:
                prompts.append("".join([*whole[:place], other, *whole[place + 1 :]]))
                places.append((number, place, other))
    weights = []
    for ids, mask, last in prompt_batches(model, tokenizer, prompts):
        out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        rows = torch.arange(len(ids), device=ids.device)
        weights.append(out.contextualization[rows, :, last, last])
    weights = torch.cat(weights).float().cpu().numpy()  # (prompts, k)
    plain = {number: weights[i] for i, (number, place, _) in enumerate(places) if place < 0}
    rows = [
        (word, number, place, texts[number][place][0].strip(), other.strip(), np.abs(weights[i] - plain[number]).sum())
        for i, (number, place, other) in enumerate(places)
        if place >= 0
    ]
    return pd.DataFrame(rows, columns=["word", "text", "place", "stands", "instead", "change"])
