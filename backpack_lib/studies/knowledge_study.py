"""What changes when one fact is edited, and what else does: every method on the same facts.

study = KnowledgeStudy({"Backpack": backpack, "Transformer": transformer}, tokenizer, facts, general, folder)
rows = study.run()                   # a row for each fact and method; resumes
table = methods_table(rows)          # a row a method: means over facts, with intervals
paired(rows, "paraphrases", ("Backpack", "projection"), ("Transformer", "finetuned"))
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from backpack_lib.analysis.bias import fewest
from backpack_lib.analysis.finetuning import Examples, bounded_share, changed, finetune, general_loss, rows_of_texts
from backpack_lib.analysis.knowledge import (
    WANTED,
    Fact,
    dose,
    margins,
    project,
    projected_inputs,
    search_strength,
    sense_effects,
    tokens_of_fact,
)  # fmt: skip
from backpack_lib.analysis.scores import nats_per_token, next_log_probabilities
from backpack_lib.analysis.statistics import mean_interval
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.model.kinds import has_senses
from backpack_lib.studies.own_texts import written_by_each
from backpack_lib.studies.text_quality import repetition
from backpack_lib.text.writing import continue_texts

AS_IT_IS, PROJECTION, DOSED, FEWEST, FINETUNED = (
    "as it is",
    "projection",
    "projection, dosed",
    "fewest senses",
    "finetuned",
)
KEYS = ["model", "method"]
RELATED = 10  # words nearest to the object, and to the counter-object
ABOUT_TOKENS, WRITTEN_TOKENS = 30, 20
MEASURES = [
    "efficacy", "paraphrases", "neighbours unchanged", "neighbours KL", "about unchanged", "about KL",
    "related to the object", "related to the counter-object", "loss with the word, %", "loss without, %",
    "perplexity of what it writes", "repetition",
]  # fmt: skip


@dataclass
class KnowledgeStudy:
    """What is edited, and how. models: "Backpack" and, if there is one, "Transformer", by name.

    general: texts on anything, which finetuning is held to: their loss rises by a share of at most each of the bounds.
    facts: such as all models know. finetuned_facts: on how many of them the Transformer is finetuned, which takes
    longest. share: of the effect, that the fewest senses should have.
    """

    models: dict
    tokenizer: object
    facts: list[Fact]
    general: list[str]
    folder: Path
    bounds: tuple[float, ...] = (0.001, 0.01)
    share: float = 0.9
    finetuned_facts: int | None = None
    sampling: dict | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.facts:
            raise ValueError("The models know none of the facts, so there is nothing to edit; give others in `facts`.")
        self.prints = {name: fingerprint(net) for name, net in self.models.items()}
        self.rows_of_general = rows_of_texts(next(iter(self.models.values())), self.tokenizer, self.general)
        self._before, self._changes = {}, {}

    # ------------------------------------------------------------ methods

    def methods(self, name: str) -> dict[str, Callable]:
        """Each method of a model by name: from a fact to a context in which it is edited."""
        net, tok = self.models[name], self.tokenizer
        if has_senses(net):
            return {
                PROJECTION: lambda fact: project(net, tok, [fact]).applied(),
                DOSED: lambda fact: project(net, tok, [fact], strengths=[dose(net, tok, fact)]).applied(),
                FEWEST: lambda fact: project(net, tok, [fact], self.fewest_senses(fact)).applied(),
            }
        return {
            PROJECTION: lambda fact: projected_inputs(net, tok, [fact]),
            DOSED: lambda fact: projected_inputs(net, tok, [fact], [search_strength(net, tok, fact)]),
        } | {f"{FINETUNED}, {eps:.1%}": lambda fact, eps=eps: self.finetuned(net, fact, eps) for eps in self.bounds}

    def fewest_senses(self, fact: Fact) -> list[int]:
        """The fewest senses whose projections together reach the wanted share of the effect on the editing prompts."""
        effect = sense_effects(self.models["Backpack"], self.tokenizer, fact, fact.edit).mean(0)
        return fewest(effect / max(effect.sum(), 1e-9), self.share) or [int(effect.argmax())]

    def finetuned(self, net, fact: Fact, eps: float):
        """All weights finetuned until the counter-object is twice as likely after editing prompts; held to a bound."""
        if fact not in self._changes:
            self._changes = {fact: self._change(net, fact)}
        change = self._changes[fact]
        return changed(net, change, bounded_share(net, change, self.rows_of_general, eps))

    def _change(self, net, fact: Fact) -> dict:
        _, object_, counter = tokens_of_fact(self.tokenizer, fact)
        n = len(fact.edit)
        examples = Examples("say", list(fact.edit), torch.full((n,), counter), torch.full((n, 1), object_))
        return finetune(net, self.tokenizer, examples, self.rows_of_general, until=WANTED, seed=self.seed)

    # ------------------------------------------------------------ measuring

    def run(self) -> pd.DataFrame:
        """-> a row a model, method and fact: `MEASURES`, and the margin after editing and testing prompts, in nats."""
        rows = []
        for name in self.models:
            contexts = {AS_IT_IS: lambda fact: nullcontext()} | self.methods(name)
            for number, fact in enumerate(tqdm(self.facts, desc=name, leave=False)):
                for method, context in contexts.items():
                    if (
                        not method.startswith(FINETUNED)
                        or self.finetuned_facts is None
                        or number < self.finetuned_facts
                    ):
                        rows.append(self._row(name, method, fact, context))
        return pd.DataFrame(rows)

    def _row(self, name: str, method: str, fact: Fact, context: Callable) -> dict:
        what = {
            "models": self.prints, "model": name, "method": method, "fact": repr(fact), "general": self.general,
            "share": self.share, "sampling": self.sampling, "seed": self.seed,
        }  # fmt: skip
        found = cached_json(
            Path(self.folder) / "facts", what, lambda: self._measure(name, fact, context, FINETUNED in method)
        )
        named = {"relation": fact.relation, "subject": fact.subject, "object": fact.object, "counter": fact.counter}
        return {"model": name, "method": method} | named | found

    def _measure(self, name: str, fact: Fact, context: Callable, everywhere: bool) -> dict:
        net = self.models[name]
        key = name, fact
        if key not in self._before:
            self._before = {key: self._state(net, fact)}
        before = self._before[key]
        with context(fact):
            # An edit of one word reaches no text without it, so their loss is not measured again.
            after = self._state(net, fact, None if everywhere else before["without"])
        with torch.inference_mode():
            judged = nats_per_token(net, self.tokenizer, after["written"], list(fact.edit))
        return compare_states(self.tokenizer, net, fact, before, after) | {
            "perplexity of what it writes": math.exp(judged),
            "repetition": repetition(after["written"], 2),
        }

    def _state(self, net, fact: Fact, without: float | None = None) -> dict:
        """All that is compared, of a model as it is now. without: the loss on texts without the subject, if known."""
        prompts = [*fact.edit, *fact.test, *fact.neighbours, *fact.about]
        cuts = np.cumsum([len(fact.edit), len(fact.test), len(fact.neighbours)])
        found = next_log_probabilities(net, self.tokenizer, prompts).cpu()
        state = dict(zip(("edit", "test", "neighbours", "about"), np.split(np.arange(len(prompts)), cuts)))
        state = {use: found[torch.as_tensor(numbers)] for use, numbers in state.items()}
        return state | {
            "with": nats_per_token(net, self.tokenizer, self._texts_with(fact)),
            "without": general_loss(net, self._rows_without(fact)) if without is None else without,
            "written": self._write(net, list(fact.edit), WRITTEN_TOKENS),
        }

    def _rows_without(self, fact: Fact) -> list[list[int]]:
        subject, _, _ = tokens_of_fact(self.tokenizer, fact)
        return [row for row in self.rows_of_general if subject not in row] or self.rows_of_general

    def _texts_with(self, fact: Fact) -> list[str]:
        """Texts about the subject; they are first asked for before any edit."""
        about = fact.about or fact.edit
        of = (self.models, self.prints, self.tokenizer, about, ABOUT_TOKENS)
        return written_by_each(*of, self.folder, self.sampling, self.seed)

    def _write(self, net, prompts: list[str], tokens: int) -> list[str]:
        return continue_texts(net, self.tokenizer, prompts, tokens, self.seed, **self.sampling or {})


def compare_states(tokenizer, net, fact: Fact, before: dict, after: dict) -> dict:
    """What an edit did to a fact and to all else; see `MEASURES`."""
    _, object_, counter = tokens_of_fact(tokenizer, fact)
    margin = {use: (after[use][:, counter] - after[use][:, object_]).double().numpy() for use in ("edit", "test")}
    found = {"efficacy": _mean(margin["edit"] > 0), "paraphrases": _mean(margin["test"] > 0)}
    for use in ("neighbours", "about"):
        a, b = before[use], after[use]
        found[f"{use} unchanged"] = _mean((a.argmax(-1) == b.argmax(-1)).numpy())
        found[f"{use} KL"] = _mean((a.exp() * (a - b)).sum(-1).numpy())
    for word, token in (("object", object_), ("counter-object", counter)):
        near = related_tokens(net, token, but=(object_, counter))
        found[f"related to the {word}"] = float((after["edit"] - before["edit"])[:, near].mean())
    for name, key in (("loss with the word, %", "with"), ("loss without, %", "without")):
        found[name] = 100 * (after[key] / before[key] - 1)
    return found | {f"margin, {use}": _mean(values) for use, values in margin.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def related_tokens(net, token: int, but=(), n: int = RELATED) -> list[int]:
    """The tokens whose output embeddings are nearest to one token's by cosine, their common mean taken out."""
    E = net.get_output_embeddings().weight.detach().float()
    E = torch.nn.functional.normalize(E - E.mean(0), dim=-1)
    order = (E @ E[token]).argsort(descending=True).tolist()
    return [one for one in order if one not in (token, *but)][:n]


# ---------------------------------------------------------------- several edits at once


def at_once(model, tokenizer, facts: list[Fact], numbers=(1, 5, 20), seed: int = 0) -> pd.DataFrame:
    """Efficacy when several facts are edited together: do the edits add up?

    Facts are drawn in groups of each size until every fact has been in one. -> a row for each size and fact: efficacy,
    paraphrases, and the margin after the editing prompts, in nats.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in numbers:
        order = rng.permutation(len(facts))
        for start in range(0, len(facts), number):
            group = [facts[n] for n in order[start : start + number]]
            with project(model, tokenizer, group).applied():
                for fact in group:
                    margin = margins(model, tokenizer, fact, fact.edit + fact.test)
                    edit, test = margin[: len(fact.edit)], margin[len(fact.edit) :]
                    rows.append((number, str(fact), _mean(edit > 0), _mean(test > 0), _mean(edit)))
    return pd.DataFrame(rows, columns=["edits at once", "fact", "efficacy", "paraphrases", "margin"])


# ---------------------------------------------------------------- what the rows show


def methods_table(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over facts with 95 % intervals, (mean, low, high) of each of `MEASURES`: a row a model and method."""
    found = {}
    for key, some in rows.groupby(KEYS, sort=False):
        found[key] = {
            (measure, what): value
            for measure in MEASURES
            for what, value in zip(("mean", "low", "high"), mean_interval(some[measure].to_numpy(), seed))
        } | {("facts", ""): len(some)}
    return pd.DataFrame(found).T.rename_axis(KEYS)


def paired(
    rows: pd.DataFrame, measure: str, one: tuple[str, str], other: tuple[str, str], seed: int = 0
) -> dict[str, float]:
    """How much more of a measure one method has than another on the same facts: difference, low, high (95 %), facts."""
    by_fact = rows.set_index([*KEYS, "relation", "subject"])[measure].sort_index()
    difference = (by_fact.loc[one] - by_fact.loc[other]).dropna()
    mean, low, high = mean_interval(difference.to_numpy(), seed)
    return {"difference": mean, "low": low, "high": high, "facts": len(difference)}
