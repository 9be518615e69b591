"""Words as tokens, and tokens as words to show. A word is given as it is written, or as the id of one token."""

from backpack_lib.model.kinds import is_index

MULTI_TOKEN = ("mean", "first", "last")  # which tokens stand for a word of several
CONTINUES = "…"  # shown before a token that continues a word


def tokens_of_word(tokenizer, word: str) -> list[int]:
    """The token ids of a word as it stands in a text: after a space, but for punctuation, and for "…ing" and its like."""
    text = word.strip()
    if not text.strip(CONTINUES):
        raise ValueError(f"{word!r} is no word; give at least one letter.")
    text = " " + text if text[0].isalnum() else text.removeprefix(CONTINUES)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def known_tokens_of_word(tokenizer, word: str) -> list[int]:
    """As `tokens_of_word`, of a word that the vocabulary can write. Raises ValueError for one that falls into bytes."""
    ids = tokens_of_word(tokenizer, word)
    if tokenizer.unk_token_id in ids or any("\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i]) for i in ids):
        raise ValueError(f"The vocabulary lacks the word {word!r}: it falls into bytes; choose another word.")
    return ids


def token_of_word(tokenizer, word: str | int) -> int:
    """The one token of a word, or a token id as it is. Raises ValueError for a word of several tokens, naming them."""
    if not isinstance(word, str):
        if not is_index(word, len(tokenizer)):
            raise ValueError(f"There is no token {word!r}; this vocabulary has the ids 0 to {len(tokenizer) - 1}.")
        return int(word)
    ids = tokens_of_word(tokenizer, word)
    if len(ids) > 1:
        parts = ", ".join(f"{name!r} ({i})" for i, name in zip(ids, spell(tokenizer, ids)))
        raise ValueError(f"{word!r} is {len(ids)} tokens here: {parts}; give one of these ids, or choose another word.")
    return ids[0]


def choose_tokens(tokenizer, word: str, multi_token: str) -> list[int]:
    """Those of a word's tokens that stand for it; see `senses_of_words`."""
    ids = tokens_of_word(tokenizer, word)
    return {"mean": ids, "first": ids[:1], "last": ids[-1:]}[multi_token]


def spell(tokenizer, ids) -> list[str]:
    """Tokens to show on their own: a word without its space, "…ing" for what continues a word, visible line ends."""
    return [_spell(tokenizer, int(i)) for i in ids]


def readable(tokenizer, token: int) -> bool:
    """Whether a token can be typed: `tokens_of_word` reads what `spell` shows of it back."""
    name = _spell(tokenizer, token)
    is_word = " " not in name and name.strip(CONTINUES)
    return bool(is_word) and tokens_of_word(tokenizer, name) == [token]


def spell_text(tokenizer, ids) -> list[str]:
    """The tokens of a text to show in their order; where a word begins without a space before it, "…" is left out."""
    names, before = spell(tokenizer, ids), ""
    for index, i in enumerate(ids):
        if not before[-1:].isalnum():
            names[index] = names[index].removeprefix(CONTINUES) or CONTINUES
        before = tokenizer.decode([int(i)])
    return names


def _spell(tokenizer, i: int) -> str:
    text = tokenizer.decode([i])
    if "\N{REPLACEMENT CHARACTER}" in text:  # some of a character's bytes
        return tokenizer.convert_ids_to_tokens(i)
    if not text.strip():
        return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    if text[0] == " ":
        return text[1:]
    return CONTINUES + text if text[0].isalnum() else text
