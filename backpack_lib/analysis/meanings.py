"""Did a word's senses learn the meanings that were planted? Read off the senses alone, and tested by removing them.

An ambiguous word of the planted corpus, such as "bat", belongs to two or three topics. Two questions are asked:

- does some sense of it push the words of each of its topics, and more than those of other topics (`planted_meanings`);
- does removing the sense that is best for one of its topics hurt predictions of that topic, and not of its other ones
  (`removal_costs`, `selectivity`)?
"""

from itertools import combinations

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.roles import relation_auc
from backpack_lib.analysis.statistics import p_value
from backpack_lib.text import planted
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text, pad_rows

TEXTS_OF_A_TOPIC = 20  # for each topic of each word


def planted_meanings(model, tokenizer) -> tuple[pd.DataFrame, pd.Series]:
    """How well each sense of an ambiguous planted word tells a topic's words from those of all other topics.

    A Transformer has no senses; the word's input embedding stands in as one.

    -> AUCs, (word, topic) x senses; and whether that topic was planted as a meaning of that word.
    """
    lexicon = planted.lexicon()
    own = {t: [token_of_word(tokenizer, w) for w in sorted(planted.topic_words(t))] for t in lexicon["topics"]}
    rows = {}
    for word in lexicon["ambiguous"]:
        x = token_of_word(tokenizer, word)
        for topic in own:
            false = [(x, y) for other in own if other != topic for y in own[other]]
            rows[word, topic] = relation_auc(model, np.array([(x, y) for y in own[topic]]), np.array(false))
    auc = pd.DataFrame.from_dict(rows, orient="index")
    auc.index = pd.MultiIndex.from_tuples(auc.index, names=["word", "topic"])
    is_meaning = pd.Series([topic in lexicon["ambiguous"][word] for word, topic in auc.index], auc.index)
    return auc, is_meaning


def separation(auc: pd.DataFrame, is_meaning: pd.Series) -> float:
    """How often a planted meaning's best AUC is above that of a topic that was not planted, over all such pairs."""
    best = auc.max(axis=1).to_numpy()
    yes, no = best[is_meaning.to_numpy()], best[~is_meaning.to_numpy()]
    return float((yes[:, None] > no[None]).mean())


def null_separations(auc: pd.DataFrame, is_meaning: pd.Series, permutations: int = 1000, seed: int = 0) -> np.ndarray:
    """`separation` where each word's meanings are permuted among the topics, (permutations,)."""
    rng, table = np.random.default_rng(seed), is_meaning.unstack(sort=False)
    return np.array(
        [
            separation(auc, pd.Series(rng.permuted(table.to_numpy(), axis=1).flatten(), is_meaning.index))
            for _ in range(permutations)
        ]
    )


@torch.no_grad()
def removal_costs(model, tokenizer, seed: int = 1) -> pd.DataFrame:
    """What removing each sense of an ambiguous word costs predictions of each of its topics, in nats.

    Counted over words of a text's topic that come after the ambiguous word. The prediction without a sense is known
    from the one with it: the weights stay, and the sense's contribution goes.

    -> (word, topic) x senses: how much the mean of -log p rises.
    """
    texts = _texts_of_meanings(seed)
    E = model.get_output_embeddings().weight
    rows = {}
    for (word, topic), some in texts.items():
        x = token_of_word(tokenizer, word)
        whole = [ids_of_text(tokenizer, text)[: model.config.n_positions] for text in some]
        ids, mask = pad_rows(whole, tokenizer.eos_token_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        out = model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        of_topic = torch.isin(ids, torch.tensor(_tokens_of_topic(tokenizer, topic), device=ids.device))
        after = (ids == x).cumsum(1) > 0
        text, place = (of_topic[:, 1:] & after[:, :-1]).nonzero(as_tuple=True)  # where such a word comes next
        nexts = ids[text, place + 1]
        logits = out.logits[text, place]  # (N, V)
        weight = (out.contextualization.transpose(1, 2)[text, place] * (ids == x)[text][:, None]).sum(-1)  # (N, k)
        pushes = model.sense_vectors(ids.new_tensor([x]))[0] @ E.T  # (k, V)
        before = logits.log_softmax(-1).gather(1, nexts[:, None]).mean()
        without = [(logits - weight[:, [l]] * pushes[l]).log_softmax(-1) for l in range(len(pushes))]
        rows[word, topic] = [(before - left.gather(1, nexts[:, None]).mean()).item() for left in without]
    costs = pd.DataFrame.from_dict(rows, orient="index")
    costs.index = pd.MultiIndex.from_tuples(costs.index, names=["word", "topic"])
    return costs


def selectivity(
    auc: pd.DataFrame, costs: pd.DataFrame, permutations: int = 10_000, seed: int = 0
) -> tuple[pd.Series, float]:
    """Does removing the best sense for a topic hurt that topic more than the word's other topic?

    auc: from `planted_meanings`, by which the senses are chosen. costs: from `removal_costs`, by which they are judged.
    For two topics A and B of a word and their best senses a and b, it is (cost of a for A - of a for B) + (cost of b
    for B - of b for A), in nats; above 0 where the senses are what they seem.

    -> it for each (word, topic, topic), and p: how often two senses at random do as well on average.
    """
    rng, found, null = np.random.default_rng(seed), {}, np.zeros(permutations)
    for word in costs.index.unique("word"):
        for one, two in combinations(costs.loc[word].index, 2):
            a, b = (int(np.argmax(auc.loc[(word, topic)])) for topic in (one, two))
            difference = (costs.loc[(word, one)] - costs.loc[(word, two)]).to_numpy()
            found[word, one, two] = difference[a] - difference[b]
            null += difference[rng.integers(len(difference), size=permutations)]
            null -= difference[rng.integers(len(difference), size=permutations)]
    series = pd.Series(found, name="nats")
    return series, p_value(null / len(series), series.mean())


def _tokens_of_topic(tokenizer, topic: str) -> list[int]:
    return [token_of_word(tokenizer, word) for word in planted.topic_words(topic)]


def _texts_of_meanings(seed: int) -> dict[tuple[str, str], list[str]]:
    """Texts in which each ambiguous word stands in each of its topics."""
    ambiguous = planted.lexicon()["ambiguous"]
    found = {(word, topic): [] for word, topics in ambiguous.items() for topic in topics}
    for text in planted.generate(20_000, seed):
        for word in set(text.text.replace(".", "").split()) & set(ambiguous):
            found[word, text.topic].append(text.text)
        if all(len(some) >= TEXTS_OF_A_TOPIC for some in found.values()):
            break
    return {key: some[:TEXTS_OF_A_TOPIC] for key, some in found.items()}
