"""The planted corpus holds what was planted, and its probabilities are exact."""

import math
import re
from collections import Counter, defaultdict

import pytest

from backpack_lib.text.planted import generate, lexicon, nouns, plural, third_person, topic_of, topic_words

TOPICS = lexicon()["topics"]


@pytest.fixture(scope="module")
def texts():
    return list(generate(6000))


def test_the_same_texts_for_a_seed_on_every_machine():
    first = next(generate(1))
    assert first.text.startswith("About kitchen, computers or music. At the bakery, the guard thinks that he sees")
    assert list(generate(5)) == list(generate(9))[:5]  # text number 4 is the same however many are asked for
    assert list(generate(5, seed=1)) != list(generate(5))


def test_no_word_plays_two_parts():
    """Otherwise a choice would not show in its word, and the log-probabilities would not be exact."""
    parts = defaultdict(set)
    for topic, entry in TOPICS.items():
        for kind, words in {
            "place": entry["places"],
            "adjective": entry["adjectives"],
            "noun": nouns(topic),
            "plural": map(plural, nouns(topic)),
            "verb": entry["verbs"],
            "third person": map(third_person, entry["verbs"]),
        }.items():
            for word in words:
                parts[word].add(kind if word in lexicon()["ambiguous"] or kind == "plural" else (kind, topic))
    for word in [*lexicon()["professions"], *lexicon()["names"]["he"], *lexicon()["names"]["she"]]:
        parts[word].add("person")
    for word in [*TOPICS, "The", "He", "She", "near", "the", "his", "her"]:
        parts[word].add("name of a topic, or a word of every text")
    # A plural may be shared by the topics of an ambiguous noun; nothing else is shared.
    assert {word: kinds for word, kinds in parts.items() if len(kinds) > 1} == {}


def test_log_probabilities_are_those_of_the_generator_and_the_frequencies(texts):
    """Counted without looking at the generator: the first words of a text."""
    plain = [text for text in texts if text.pieces[0] == "At"]
    assert len(plain) / len(texts) == pytest.approx(0.5, abs=0.03)
    for place, count in Counter(text.pieces[2] for text in plain).items():
        assert count / len(plain) == pytest.approx(1 / 32, rel=0.35), place
    assert all(text.log_probs[2] == pytest.approx(math.log(1 / 32)) for text in plain)
    # Whatever can follow the first words has a probability of one in all.
    followers = defaultdict(dict)
    for text in texts:
        for place in range(4):
            known = followers[text.pieces[:place]].setdefault(text.pieces[place], text.log_probs[place])
            assert known == pytest.approx(text.log_probs[place])
    for options in followers.values():
        assert sum(map(math.exp, options.values())) == pytest.approx(1.0, abs=1e-9)


def test_an_announced_text_is_about_one_of_the_three_topics_that_it_names(texts):
    announced = [text for text in texts if text.pieces[0] == "About"]
    numbers = Counter()
    for text in announced:
        named = re.match(r"About (\w+), (\w+) or (\w+)\. At the", text.text).groups()
        assert len(set(named)) == 3 and sum(text.log_probs[:9]) == pytest.approx(math.log(1 / (2 * 8 * 7 * 6)))
        assert text.log_probs[9] == pytest.approx(math.log(1 / 12))  # three topics of four places
        numbers[named.index(text.topic)] += 1
    assert all(count / len(announced) == pytest.approx(1 / 3, rel=0.1) for count in numbers.values())


def test_pronouns_of_a_profession_are_as_frequent_as_planted(texts):
    seen = defaultdict(list)
    for text in texts:
        if p := lexicon()["professions"].get(text.person):
            seen[text.person].append(text.pronoun == "he")
            place = text.pieces.index(" " + text.pronoun)
            assert text.log_probs[place] == pytest.approx(math.log(p if text.pronoun == "he" else 1 - p))
    for profession, p in lexicon()["professions"].items():
        n = len(seen[profession])
        assert abs(sum(seen[profession]) / n - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_verbs_agree_with_their_noun_and_pronouns_with_the_person(texts):
    for text in texts[:500]:
        verbs = TOPICS[text.topic]["verbs"]
        forms = {noun: set(map(third_person, verbs)) for noun in nouns(text.topic)}
        forms |= {plural(noun): set(verbs) for noun in nouns(text.topic)}
        for noun, verb in re.findall(r"The (?:\w+ )?(\w+) (\w+)(?:\.| near)", text.text):
            assert verb in forms.get(noun, {verb}), text.text
        other = {"he": {"she", "her"}, "she": {"he", "his"}}[text.pronoun]
        assert not other & set(re.findall(r"\w+", text.text.lower()))


def test_the_topic_of_a_text_is_read_off_words_that_are_its_topics_alone(texts):
    assert all(topic_of(text.text) == text.topic for text in texts[:1000])
    assert topic_of("He says that she likes it.") is topic_of("The zoo. The gym.") is None
    words = [word for topic in TOPICS for word in topic_words(topic)]
    assert len(set(words)) == len(words) and "bat" not in words
