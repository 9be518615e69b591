"""Did a word's senses learn the meanings that were planted? Read off the senses alone, and tested by removing them.

An ambiguous word of the planted corpus, such as "bat", belongs to two or three topics. Does some sense of it push the
words of each of its topics, and more than those of other topics (`planted_meanings`)? Does removing the sense that is
best for one of them hurt predictions of that topic, and not of the others (`removal_costs`)?
"""

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis.roles import relation_auc
from backpack_lib.text import planted
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text, pad_rows

TEXTS_OF_A_TOPIC = 20  # for each topic of each word


def planted_meanings(model, tokenizer) -> tuple[pd.DataFrame, pd.Series]:
    """How well each sense of an ambiguous planted word tells a topic's words from those of all other topics.

    Of a Transformer, the word's input embedding stands in as one sense. -> AUCs, (word, topic) x senses; and whether
    that topic was planted as a meaning of that word.
    """
    lexicon = planted.lexicon()
    own = {topic: _tokens_of_topic(tokenizer, topic) for topic in lexicon["topics"]}
    rows = {}
    for word in lexicon["ambiguous"]:
        x = token_of_word(tokenizer, word)
        for topic in own:
            true = np.array([(x, y) for y in own[topic]])
            false = np.array([(x, y) for other in own if other != topic for y in own[other]])
            rows[word, topic] = relation_auc(model, true, false)
    auc = pd.DataFrame(rows).T.rename_axis(["word", "topic"])
    is_meaning = pd.Series([topic in lexicon["ambiguous"][word] for word, topic in auc.index], auc.index)
    return auc, is_meaning


def separation(auc: pd.DataFrame, is_meaning: pd.Series) -> float:
    """How often a planted meaning's best AUC is above that of a topic that was not planted, over all such pairs."""
    best = auc.max(axis=1).to_numpy()
    yes, no = best[is_meaning.to_numpy()], best[~is_meaning.to_numpy()]
    return float((yes[:, None] > no[None]).mean())


@torch.no_grad()
def removal_costs(model, tokenizer) -> pd.DataFrame:
    """What removing each sense of an ambiguous word costs predictions of each of its topics, in nats.

    Counted over words of a text's topic that come after the ambiguous word. The prediction without a sense is known
    from the one with it: the weights stay, and the sense's contribution goes.

    -> (word, topic) x senses: how much the mean of -log p rises.
    """
    E = model.get_output_embeddings().weight
    costs = {}
    for (word, topic), texts in texts_of_meanings().items():
        x = token_of_word(tokenizer, word)
        rows = [ids_of_text(tokenizer, text)[: model.config.max_position_embeddings] for text in texts]
        ids, mask = (tensor.to(model.device) for tensor in pad_rows(rows, tokenizer.eos_token_id))
        out = model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        is_word = ids == x
        is_after = is_word.cumsum(1) > 0
        of_topic = torch.isin(ids, ids.new_tensor(_tokens_of_topic(tokenizer, topic)))
        text, place = (is_after[:, :-1] & of_topic[:, 1:]).nonzero(as_tuple=True)  # where such a word comes next
        target = ids[text, place + 1][:, None]  # (N, 1)
        logits = out.logits[text, place]  # (N, V)
        alpha = out.contextualization[text, :, place]  # (N, k, T)
        weight = (alpha * is_word[text, None]).sum(-1)  # (N, k)
        pushes = model.sense_vectors(ids.new_tensor([x]))[0] @ E.T  # (k, V)
        before = logits.log_softmax(-1).gather(1, target).mean()
        costs[word, topic] = []
        for sense in range(len(pushes)):
            without = logits - weight[:, [sense]] * pushes[sense]
            costs[word, topic].append((before - without.log_softmax(-1).gather(1, target).mean()).item())
    return pd.DataFrame(costs).T.rename_axis(["word", "topic"])


def texts_of_meanings() -> dict[tuple[str, str], list[str]]:
    """Texts in which each ambiguous word stands in each of its topics, by (word, topic); none that a model was trained on."""
    ambiguous = planted.lexicon()["ambiguous"]
    texts = {(word, topic): [] for word, topics in ambiguous.items() for topic in topics}
    for text in planted.generate(seed=1):
        for word in set(text.text.replace(".", "").split()) & set(ambiguous):
            texts[word, text.topic].append(text.text)
        if min(map(len, texts.values())) >= TEXTS_OF_A_TOPIC:
            break
    return {meaning: of_meaning[:TEXTS_OF_A_TOPIC] for meaning, of_meaning in texts.items()}


def _tokens_of_topic(tokenizer, topic: str) -> list[int]:
    return [token_of_word(tokenizer, word) for word in sorted(planted.topic_words(topic))]
