"""What 05_knowledge alone needs: facts and texts that suit a model, planted new facts, stored tables, exercises."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from backpack_lib.analysis import finetuning as ft
from backpack_lib.analysis.finetuning import Examples, SenseTeaching, make_examples
from backpack_lib.analysis.knowledge import Fact, known, read_facts, tokens_of_fact, usable
from backpack_lib.analysis.scores import next_log_probabilities
from backpack_lib.files import data_folder
from backpack_lib.lessons.exercises import check_choice, check_function, check_number
from backpack_lib.lessons.opening import PLANTED, Lesson, check_stored
from backpack_lib.loading import fingerprint, load
from backpack_lib.model.kinds import has_senses
from backpack_lib.studies.teaching_study import check_methods
from backpack_lib.text import planted
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.words import token_of_word, tokens_of_word
from backpack_lib.text.writing import continue_texts

GENERAL_TEXTS, GENERAL_TOKENS, CHARACTERS = 12, 50, 600  # of texts that a model writes, and of a paragraph by people
STORED = "demo/knowledge"
PEOPLE = ("Adam", "Emma", "Oscar", "Sara", "Tom")  # names in the planted phrasings
MOVED = {"zoo": "law", "opera": "river", "market": "computers", "lab": "animals"}  # places, and the topics they move to


@dataclass
class Material:
    """models: by name. counts: how many facts of each relation can be used, and which of the models know them.
    facts: those that all models know, in a seeded order, the example first. general: texts on anything. sets: to be
    taught.
    """

    models: dict
    example: Fact
    counts: pd.DataFrame
    facts: list[Fact]
    general: list[str]
    sets: pd.DataFrame


def open_material(
    lesson: Lesson,
    transformer=None,
    facts: str = "",
    relations: str = "",
    examples: str = "",
    reference: str = "",
    seed: int = 0,
) -> Material:
    """What a notebook's parameters ask for. Where the models know no fact together, the example stands in.

    Raises ValueError, before anything takes long, for what does not fit the model.
    """
    tok, example = lesson.tokenizer, example_fact(lesson)
    models = {"Backpack": lesson.model} | ({} if transformer is None else {"Transformer": transformer})
    given = read_facts(facts, relations) if facts or lesson.kind != PLANTED else planted_facts()
    sets = ft.read_examples(examples) if examples or lesson.kind != PLANTED else planted_sets(seed)
    teachable = [name for name in dict.fromkeys(sets["set"]) if _can_be_taught(tok, sets[sets["set"] == name])]
    if examples and not teachable:
        raise ValueError(
            f"{examples!r} holds no set with two examples to fit and one to test that this vocabulary can say."
        )
    can = usable(given, tok)
    knows = {name: set(known(net, tok, can)) for name, net in models.items()}
    shared = [fact for fact in can if all(fact in some for some in knows.values())]
    columns = {"facts": given, "of one token each": can} | {
        f"known to the {name}": list(some) for name, some in knows.items()
    }
    counts = pd.DataFrame(
        {name: _by_relation(some) for name, some in columns.items()} | {"known to all": _by_relation(shared)}
    )
    order = np.random.default_rng(seed).permutation(len(shared))
    return Material(
        models, example, counts.fillna(0).astype(int), [shared[n] for n in order] or [example],
        general_texts(lesson, models, reference, seed),
        sets[sets["set"].isin(teachable)] if teachable else _set_of(example),
    )  # fmt: skip


def check_settings(facts_measured: int, finetuned_facts: int, methods: list[str], bounds: list[float], share: float):
    """Raises ValueError for settings that are out of range."""
    for name, number in (("facts_measured", facts_measured), ("finetuned_facts", finetuned_facts)):
        if number < 0:
            raise ValueError(f"{name}={number} is out of range; give a number of facts, or 0 for all.")
    check_methods(methods)
    if not bounds:
        raise ValueError("bounds=[] holds no bound; give at least one, such as 0.001.")
    for eps in bounds:
        ft.walk_back(lambda _: 0.0, 0.0, eps)
    if not 0 < share <= 1:
        raise ValueError(f"share={share} should be above 0 and at most 1.")


def _can_be_taught(tokenizer, table: pd.DataFrame) -> bool:
    try:
        return len(make_examples(tokenizer, table, "fit")) > 1 and len(make_examples(tokenizer, table, "test")) > 0
    except ValueError:
        return False


def _set_of(fact: Fact) -> pd.DataFrame:
    """The counter-object of a fact as what is to be taught, for a vocabulary in which no other set can be said."""
    rows = [("example", "prefer", use, text, fact.counter, fact.object)
            for use, texts in (("fit", fact.edit * 2), ("test", fact.test or fact.edit)) for text in texts]  # fmt: skip
    return pd.DataFrame(rows, columns=ft.COLUMNS)


def _by_relation(facts) -> pd.Series:
    return pd.Series([fact.relation for fact in facts], dtype=str).value_counts(sort=False)


def example_fact(lesson: Lesson) -> Fact:
    """The fact to begin with: words and phrasings from the lesson's examples."""
    e = lesson.example
    if prompts := getattr(e, "prompts", None):
        fact = own_fact(e.subject, e.object, e.counter, [text.replace("{subject}", e.subject) for text in prompts])
        return _checked(lesson.tokenizer, fact)
    own = {
        use: tuple(text.replace("{subject}", e.subject) for text in getattr(e, use))
        for use in ("edit", "test", "about")
    }
    return _checked(
        lesson.tokenizer, Fact("example", e.subject, e.object, e.counter, **own, neighbours=tuple(e.neighbours))
    )


def _checked(tokenizer, fact: Fact) -> Fact:
    """Raises ValueError for words that cannot be edited, and for a prompt without the subject's token."""
    subject, _, _ = tokens_of_fact(tokenizer, fact)
    for text in fact.edit:
        if subject not in tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"The prompt {text!r} lacks {fact.subject!r} as a word after a space; give prompts that have it."
            )
    return fact


def general_texts(lesson: Lesson, models: dict, reference: str = "", seed: int = 0) -> list[str]:
    """Texts on anything: by people where `reference` names some, planted, or written by the models themselves."""
    if reference:
        paragraphs = (text[:CHARACTERS] for text in first_characters(open_corpus(reference).read(), 200_000))
        return [text for text in paragraphs if text.strip()][: 2 * GENERAL_TEXTS]
    if lesson.kind == PLANTED:
        return unmoved_texts(seed)
    written = [
        continue_texts(net, lesson.tokenizer, [""] * GENERAL_TEXTS, GENERAL_TOKENS, seed, top_k=0)
        for net in models.values()
    ]
    return [text for pair in zip(*written) for text in pair]


# ---------------------------------------------------------------- planted text, where the truth is exact


def planted_facts() -> list[Fact]:
    """For each planted place: a noun of its topic, and one of another topic, which never follows there."""
    topics = planted.lexicon()["topics"]
    names, facts = list(topics), []
    for n, (topic, entry) in enumerate(topics.items()):
        other = names[(n + 1) % len(names)]
        for i, place in enumerate(entry["places"]):
            subjects = [one for one in topics[names[(n + 2) % len(names)]]["places"]] + [entry["places"][i - 1]]
            object_, counter = (plain_noun(topics[one], i) for one in (topic, other))
            facts.append(planted_fact(place, object_, counter, subjects))
    return facts


def plain_noun(entry: dict, number: int) -> str:
    return entry["nouns"][number % len(entry["nouns"])]


def planted_fact(place: str, object_: str, counter: str, others: list[str]) -> Fact:
    """A fact whose phrasings are texts of the planted corpus up to a noun."""
    texts = [
        f"At the {place}, {name} says that {'he' if name in ('Adam', 'Oscar', 'Tom') else 'she'} needs the"
        for name in PEOPLE
    ]
    about = [f"At the {place}, the {job}" for job in ("nurse", "guard")] + [f"At the {place}, Adam thinks that"]
    neighbours = tuple(texts[0].replace(f" {place},", f" {other},") for other in others)
    return Fact(
        "place and thing", place, object_, counter, tuple(texts[:2]), tuple(texts[2:]), tuple(about), neighbours
    )


def new_facts(place: str, topic: str, n: int, seed: int = 0) -> pd.DataFrame:
    """Examples of a corpus in which a place belongs to another topic: n texts up to their first word of that topic.

    They are the planted corpus' own texts of that topic with the place put in, so they are as exact. -> rows as in
    `data/canonical.csv`; the contrast is a noun of the topic that the place has had.
    """
    old = next(name for name, entry in planted.lexicon()["topics"].items() if place in entry["places"])
    places, rows = planted.lexicon()["topics"][topic]["places"], []
    for number, text in enumerate(planted.generate(40 * n + 2000, seed=seed + 5000)):
        pieces = [piece.strip() for piece in text.pieces]
        if text.topic != topic or pieces[0] != "At":
            continue
        pieces[2] = place
        own = (
            i for i, word in enumerate(pieces) if i > 2 and word in planted.topic_words(topic) and word not in places
        )
        first = next(own, None)
        if first is None:  # all of its words have other meanings, too
            continue
        prompt = "".join(text.pieces[:first]).replace(text.pieces[2], f" {place}", 1)
        rows.append(
            (f"{place} → {topic}", "say", prompt, pieces[first], plain_noun(planted.lexicon()["topics"][old], number))
        )
        if len(rows) == n:
            break
    table = pd.DataFrame(rows, columns=["set", "kind", "prompt", "target", "contrast"])
    return table.assign(use="fit")[ft.COLUMNS]


def planted_sets(seed: int = 0, n: int = 24) -> pd.DataFrame:
    """Sets to teach a model of planted text: places that move to other topics; half of the texts are for testing."""
    tables = []
    for place, topic in MOVED.items():
        table = new_facts(place, topic, 2 * n, seed)
        table.loc[n:, "use"] = "test"
        about = table.iloc[:6].assign(
            use="about", prompt=[f"At the {place}, the {job}" for job in list(planted.lexicon()["professions"])[:6]]
        )
        tables += [table, about]
    return pd.concat(tables, ignore_index=True)


def unmoved_texts(seed: int = 0) -> list[str]:
    """Planted texts without the places that move, of which both corpora say the same."""
    texts = planted.generate(600, seed=seed + 1000)
    return [t.text for t in texts if MOVED.keys().isdisjoint(re.findall(r"\w+", t.text))][: 2 * GENERAL_TEXTS]


def topic_mass(model, tokenizer, prompts: list[str], topic: str, old: str) -> np.ndarray:
    """p of a topic's words, as a share of p of its and the old topic's, after each prompt, (n,); the truth is 1."""
    found = next_log_probabilities(model, tokenizer, prompts).exp().cpu()
    mass = []
    for one in (topic, old):
        ids = [tokens_of_word(tokenizer, word) for word in sorted(planted.topic_words(one))]
        mass.append(found[:, [i for i, *more in ids if not more]].sum(1))
    return (mass[0] / (mass[0] + mass[1])).numpy()


def planted_teaching(numbers=(1, 5, 20), eps: float = 1e-3, seed: int = 0) -> pd.DataFrame:
    """New facts of a second corpus, learnt from 1, 5 or 20 examples by senses and by all weights of the planted models.

    -> a row for each place, number of examples, model and method: the new topic's share after held-out texts (truth 1),
    and after the texts of other places of the old topic (truth 0), where the loss on general text rises by at most eps.
    """
    models = {"Backpack": load("planted"), "Transformer": load("planted-transformer")}
    general, rows = unmoved_texts(seed), []
    for place, topic in MOVED.items():
        old = next(name for name, entry in planted.lexicon()["topics"].items() if place in entry["places"])
        test = list(new_facts(place, topic, 60, seed)["prompt"].iloc[30:])
        other = planted.lexicon()["topics"][old]["places"]
        elsewhere = [text.replace(f" {place}", f" {next(p for p in other if p != place)}", 1) for text in test]
        for name, (net, tok) in models.items():
            background = ft.rows_of_texts(net, tok, general)
            for n in numbers:
                examples = make_examples(tok, new_facts(place, topic, n, seed), "fit")
                for method, context in _ways(net, tok, examples, background, eps):
                    with context:
                        masses = [float(topic_mass(net, tok, texts, topic, old).mean()) for texts in (test, elsewhere)]
                    rows.append((place, n, f"{name}, {method}", *masses))
    return pd.DataFrame(rows, columns=["place", "examples", "method", "moved", "elsewhere"])


def _ways(net, tok, examples: Examples, background: list, eps: float):
    if has_senses(net):
        yield "senses", SenseTeaching(net, tok, examples, background).edits(eps).applied()
    change = ft.finetune(net, tok, examples, background, learning_rate=1e-3)
    yield "all weights", ft.changed(net, change, ft.bounded_share(net, change, background, eps))


# ---------------------------------------------------------------- tables that are stored


def stored(name: str, model: str, lesson: Lesson, bounds=()) -> pd.DataFrame | None:
    """The rows of a study on all facts or with all methods, measured by `make knowledge`, if they are of this model.

    name: "facts" or "taught"; of the latter only if it was measured at all of the bounds.
    """
    file = data_folder() / STORED / f"{name}.csv.gz"
    if model != "demo" or not file.is_file():
        return None
    rows = pd.read_csv(file)
    check_stored(rows.pop("weights"), lesson, "make knowledge")
    if bounds and not set(bounds) <= set(rows["bound"]):
        return None
    return rows.fillna({"setting": ""}) if "setting" in rows else rows


def store(rows: pd.DataFrame, lesson: Lesson, folder: Path, name: str) -> pd.DataFrame:
    """Writes a study's rows as they can be stored."""
    rows.round(5).assign(weights=fingerprint(lesson.model)).to_csv(folder / f"{name}.csv.gz", index=False)
    return rows


def with_intervals(table: pd.DataFrame, measures: list[str]) -> pd.DataFrame:
    """A study's table to show: a row for each model and method, "mean [low, high]" of some measures."""

    def written(row, measure: str) -> str:
        mean, low, high = (row[(measure, part)] for part in ("mean", "low", "high"))
        digits = 3 if "KL" in measure else 2
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    return pd.DataFrame(
        {measure: [written(row, measure) for _, row in table.iterrows()] for measure in measures},
        index=pd.Index([f"{model}: {method}" for model, method in table.index], name="edit"),
    )


# ---------------------------------------------------------------- exercises


def check_projection(answer) -> str:
    """answer: (C (k, d), e_r (d,), e_a (d,)) -> the projected senses (k, d)."""

    def reference(C, e_r, e_a):
        c = (C @ e_r / (e_r @ e_r))[:, None]
        return C - c * e_r + c * e_a * (e_r @ e_r) / (e_a @ e_a)

    draw = torch.Generator().manual_seed(0)
    cases = [tuple(torch.randn(*shape, generator=draw) for shape in ((4, d), (d,), (d,))) for d in (6, 10)]
    return check_function(answer, reference, cases)


def check_prediction(answer, lesson: Lesson, fact: Fact, before: torch.Tensor, after: torch.Tensor) -> str:
    """The log-odds of counter-object to object after the edit."""
    _, object_, counter = tokens_of_fact(lesson.tokenizer, fact)
    truth, old = ((x[counter] - x[object_]).item() for x in (after, before))
    return check_number(
        answer, truth, [(old, "these are the log-odds before the edit."), (-truth, "the sign is turned.")], 5e-3
    )


def check_dose(answer) -> str:
    """answer: (before, effect, wanted) -> the strength at which the margin is what is wanted."""
    cases = [(-3.0, 2.0, 0.7), (-1.0, 4.0, 0.0), (-0.5, 0.25, 0.7)]
    return check_function(answer, lambda before, effect, wanted: (wanted - before) / effect, cases)


def check_neighbours_claim(answer) -> str:
    return check_choice(
        answer,
        "b",
        {
            "a": "five neighbours a fact, over all facts, are hundreds of prompts.",
            "b": "the edit reaches only texts that hold its word, "
            "so any edit of one word, however bad, leaves these alone.",
            "c": "the neighbours were written before any edit was measured.",
            "d": "it is exactly zero, and stays so at any strength.",
        },
    )


def check_scores(answer) -> str:
    """answer: (here (T, k), general (T, k), weight, n) -> the n places of the highest scores in the flattened table."""

    def reference(here, general, weight, n):
        return (here - weight * general).flatten().topk(n).indices.sort().values.float()

    def as_sorted(*case):
        return torch.as_tensor(answer(*case)).flatten().float().sort().values

    draw = torch.Generator().manual_seed(0)
    cases = [
        (torch.rand(5, 3, generator=draw), torch.rand(5, 3, generator=draw) / 100, w, n)
        for w, n in ((10.0, 2), (1000.0, 4))
    ]
    return check_function(as_sorted if callable(answer) else None, reference, cases)


def check_walk_back(answer) -> str:
    """answer: (losses (n,), eps) at shares 0, ..., 1 -> the largest share up to which all losses meet the bound."""

    def reference(losses, eps):
        meets = (losses <= (1 + eps) * losses[0]).to(torch.int).cumprod(0)
        return (meets.sum().item() - 1) / (len(losses) - 1)

    losses = torch.tensor([4.0, 4.001, 4.003, 4.02, 4.1])
    return check_function(answer, reference, [(losses, eps) for eps in (1e-4, 1e-3, 1e-2, 1.0)])


def check_cost_claim(answer) -> str:
    return check_choice(
        answer,
        "c",
        {
            "a": "the same texts bound all methods.",
            "b": "the loss may fall as well as rise, but that is not what makes the claim weak.",
            "c": "general text hardly holds the edited words, so it cannot show what happens to them; "
            "texts with these words can.",
            "d": "a bound on the share of the loss does not depend on the size of the model.",
        },
    )


def own_fact(subject: str, object_: str, counter: str, prompts: list[str]) -> Fact:
    """A fact of one's own, with its prompts as phrasings to edit with."""
    return Fact("own", subject, object_, counter, tuple(prompts))


def check_own_fact(answer, lesson: Lesson, facts: list[Fact]) -> str:
    """A fact that the model knows and that is not in the table."""
    if not isinstance(answer, Fact):
        return "Not yet: make one by `checks.own_fact(subject, object, counter, prompts)`."
    try:
        tokens_of_fact(lesson.tokenizer, answer)
    except ValueError as error:
        return f"Not yet: {error}"
    if (answer.subject, answer.object) in {(fact.subject, fact.object) for fact in facts}:
        return "Not yet: that one is in the table."
    subject = token_of_word(lesson.tokenizer, answer.subject)
    if not all(subject in tokens_of_word(lesson.tokenizer, prompt) for prompt in answer.edit):
        return "Not yet: each prompt needs the subject, after a space."
    if answer not in known(lesson.model, lesson.tokenizer, [answer]):
        return f"Not yet: after one of the prompts, the model finds {answer.counter!r} likelier than {answer.object!r}."
    return "Right: the model knows that."
