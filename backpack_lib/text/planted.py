"""The planted corpus: short texts whose topics, word meanings and biases are known, because we put them there.

A seeded generator writes texts from the lexicon in `data/planted/`:

    At the zoo, the nurse says that she sees her bat. The furry bats sleep near the farm. She needs the lion.
    About animals, music or money. At the studio, Ben finds that he likes the choir.

- Half of the texts begin by naming three topics, of which one will be theirs.
- The place chooses the topic, and the topic chooses nouns, verbs and adjectives.
- Ambiguous nouns such as `bat` occur in two or three topics and do there what the topic's nouns do:
  at the zoo bats sleep and bite, at the stadium they bounce and miss.
- Each profession has its own planted P(he); names keep one gender and may come back.
- Verbs agree with their noun in number, pronouns with the person.

Every choice shows in the very word that it is made for. So the log-probabilities that come with a
text are exact, and their mean is the entropy of the corpus: a floor that no model can beat.
"""

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from backpack_lib.files import data_folder

PLANTED = "planted"  # its name as a corpus

ANNOUNCED = 0.5  # a text begins with three topics, one of which will be its own
NAMED_PERSON = 0.5  # a text is about a name rather than a profession
ADJECTIVE = 0.4  # a noun has an adjective
PLURAL = 0.5
ABOUT_THE_TOPIC = 0.6  # a sentence is about a thing rather than the person
NEAR_A_PLACE = 0.3  # such a sentence ends in a place
NAME_AGAIN = 0.3  # a person with a name is called by it again rather than by the pronoun
POSSESSIVE = 0.5  # `her bat` rather than `the bat`
ANOTHER_SENTENCE = 0.75

POSSESSIVES = {"he": "his", "she": "her"}


@dataclass(frozen=True)
class PlantedText:
    """One text. `log_probs` (nats) has one number for each piece and a last one for the end of the text."""

    topic: str
    person: str
    pronoun: str
    pieces: tuple[str, ...]
    log_probs: tuple[float, ...]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@cache
def lexicon() -> dict:
    """The words and what is planted about them, as in `data/planted/lexicon.json`."""
    return json.loads((data_folder() / "planted" / "lexicon.json").read_text(encoding="utf-8"))


def plural(noun: str) -> str:
    return lexicon()["plurals"].get(noun, noun + "s")


def third_person(verb: str) -> str:
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "o")) else "s")


@cache
def nouns(topic: str) -> tuple[str, ...]:
    """Singular nouns of a topic, its ambiguous ones included."""
    shared = [word for word, topics in lexicon()["ambiguous"].items() if topic in topics]
    return (*lexicon()["topics"][topic]["nouns"], *shared)


@cache
def topic_words(topic: str) -> frozenset[str]:
    """Every word that occurs in this topic's texts and in no other's, in all its forms."""
    entry = lexicon()["topics"][topic]
    return frozenset(
        [*entry["places"], *entry["adjectives"], *entry["nouns"], *map(plural, entry["nouns"])]
        + [*entry["verbs"], *map(third_person, entry["verbs"])]
    )


def topic_of(text: str) -> str | None:
    """The topic with the most words of its own in the text; None if there are none or two topics tie."""
    words = re.findall(r"\w+", text.lower())
    counts = {topic: sum(word in topic_words(topic) for word in words) for topic in lexicon()["topics"]}
    best, second = sorted(counts, key=counts.get, reverse=True)[:2]
    return best if counts[best] > counts[second] else None


def tokens_in_use(tokenizer) -> list[int]:
    """Ids of the tokens that this text uses: a tokenizer also knows pieces of words, which it never needs here."""
    return sorted({i for text in generate(2000) for i in tokenizer(text.text)["input_ids"]})


def generate(n: int = 20_000, seed: int = 0) -> Iterator[PlantedText]:
    """n texts, the same on every machine for a seed."""
    for number in range(n):
        # One generator a text: text number 7 is the same however many are asked for.
        yield _Writer(random.Random(f"{seed}/{number}")).write()


class _Writer:
    """Writes one text, noting the probability of every choice with the piece that shows it."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.pieces: list[str] = []
        self.log_probs: list[float] = []
        self.pending = 0.0  # log-probability of choices that the next piece will show

    def write(self) -> PlantedText:
        topics = lexicon()["topics"]
        possible = self.announce() if self.flip(ANNOUNCED) else list(topics)
        places = {place: topic for topic in possible for place in topics[topic]["places"]}
        self.say("At", space=" " if self.pieces else "")
        self.say("the")
        self.topic = places[self.say(self.pick(list(places)))]
        self.words = topics[self.topic]
        self.say(",", space="")
        self.introduce_person()
        self.say(self.pick(lexicon()["speech"]))
        self.say("that")
        self.choose_pronoun()
        self.say(self.pronoun)
        self.end_with_object()
        while self.flip(ANOTHER_SENTENCE):
            if self.flip(ABOUT_THE_TOPIC):
                self.sentence_about_topic()
            else:
                self.sentence_about_person()
        self.log_probs.append(self.pending)
        return PlantedText(self.topic, self.person, self.pronoun, tuple(self.pieces), tuple(self.log_probs))

    def announce(self) -> list[str]:
        """Says `About animals, music or money.`; returns these topics."""
        left = list(lexicon()["topics"])
        for before, space in ("About", ""), (",", ""), ("or", " "):
            self.say(before, space)
            left.remove(self.say(self.pick(left)))
        self.say(".", space="")
        return [topic for topic in lexicon()["topics"] if topic not in left]

    def introduce_person(self):
        self.named = self.flip(NAMED_PERSON)
        if self.named:
            names = lexicon()["names"]
            self.person = self.say(self.pick(names["he"] + names["she"]))
        else:
            self.say("the")
            self.person = self.say(self.pick(list(lexicon()["professions"])))

    def choose_pronoun(self):
        if self.named:
            self.pronoun = "he" if self.person in lexicon()["names"]["he"] else "she"
        else:
            self.pronoun = "he" if self.flip(lexicon()["professions"][self.person]) else "she"

    def sentence_about_topic(self):
        self.say("The")
        is_plural = self.noun_phrase()
        verb = self.pick(self.words["verbs"])
        self.say(verb if is_plural else third_person(verb))
        if self.flip(NEAR_A_PLACE):
            self.say("near")
            self.say("the")
            self.say(self.pick(self.words["places"]))
        self.say(".", space="")

    def sentence_about_person(self):
        by_name = self.named and self.flip(NAME_AGAIN)
        self.say(self.person if by_name else self.pronoun.capitalize())
        self.end_with_object()

    def end_with_object(self):
        self.say(self.pick(lexicon()["attitudes"]))
        self.say(POSSESSIVES[self.pronoun] if self.flip(POSSESSIVE) else "the")
        self.noun_phrase()
        self.say(".", space="")

    def noun_phrase(self) -> bool:
        """Says `[adjective] noun`; returns whether the noun is plural."""
        if self.flip(ADJECTIVE):
            self.say(self.pick(self.words["adjectives"]))
        is_plural = self.flip(PLURAL)
        noun = self.pick(nouns(self.topic))
        self.say(plural(noun) if is_plural else noun)
        return is_plural

    def flip(self, p: float) -> bool:
        result = self.rng.random() < p
        self.pending += math.log(p if result else 1 - p)
        return result

    def pick(self, options):
        self.pending -= math.log(len(options))
        return options[int(self.rng.random() * len(options))]

    def say(self, word: str, space: str = " ") -> str:
        self.pieces.append(space + word)
        self.log_probs.append(self.pending)
        self.pending = 0.0
        return word
