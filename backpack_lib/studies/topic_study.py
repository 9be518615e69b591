"""Does control draw texts to topics? Texts of several methods, strengths and temperatures, and what they show.

    study = TopicStudy(backpack, transformer, tokenizer, topics, judge, prompts, folder="runs/topics")
    texts = study.run()                   # a row a judged text; what was stopped resumes
    table = settings_table(texts)         # a row for each method, strength and temperature
    fair = at_equal_fluency(table)        # the temperature of each at which texts are as likely as without control

More weight on some senses makes texts more predictable, and so does a lower temperature. So methods are compared where
their texts have the perplexity of texts without control, under a model that did not write them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from tqdm.auto import tqdm

from backpack_lib.analysis import pplm
from backpack_lib.analysis.scores import log_probabilities
from backpack_lib.analysis.statistics import MIDDLE, p_value
from backpack_lib.analysis.topic import LargestPushes, TopicControl
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.studies.fluency import search_temperature
from backpack_lib.studies.judges import WordJudge
from backpack_lib.studies.text_quality import count_among, repeated_runs, words_of
from backpack_lib.text.writing import continue_texts, ids_of_text

BACKPACK, PPLM = "Backpack", "PPLM"
SETTING = ["method", "strength", "temperature"]
TOLERANCE = 0.05  # of the perplexity of no control, within which fluency counts as equal
PSEUDO_RATE = 0.5 / 1000  # topic words per word that are added to every count, so that none divides by zero


@dataclass
class TopicStudy:
    """What is written and how it is judged.

    topics: dictionaries with `name`, the words that steer toward it, `steer`, and others by which it is known, `words`.
    judge: texts -> DataFrame of booleans, texts x topic names. prompts: (topic name, n) -> n beginnings.
    strengths: of the Backpack's control, steps: of PPLM's; 0, no control, is added to each.
    trials: temperatures that are tried at most, for each strength. judge_name: another name, other results on disk.
    """

    backpack: object
    transformer: object | None
    tokenizer: object
    topics: list[dict]
    judge: Callable[[list[str]], pd.DataFrame]
    prompts: Callable[[str, int], list[str]]
    folder: Path
    strengths: tuple[float, ...] = (1, 2, 3)
    steps: tuple[float, ...] = (0.1, 0.3)
    samples: int = 16
    tokens: int = 50
    trials: int = 6
    seed: int = 0
    judge_name: str = "words"
    largest: LargestPushes | None = None
    controls: dict[str, TopicControl] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("samples", "tokens", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} should be at least 1.")
        if not self.topics:
            raise ValueError("A study needs at least one topic.")
        self.largest = LargestPushes(self.backpack) if self.largest is None else self.largest
        self.words = WordJudge(self.topics)
        self.prints = {BACKPACK: fingerprint(self.backpack)}
        if self.transformer is not None:
            self.prints[PPLM] = fingerprint(self.transformer)

    def run(self) -> pd.DataFrame:
        """Writes and judges all texts, or reads them where they are written.

        -> a row a text and topic that it is judged on: its own, or, without control, every one.

        Columns: method, strength, temperature, topic, text; nats and tokens, under a model that did not write it;
        words, topic words and steering words; on topic; runs (of four words) and repeated runs; and seconds.
        """
        plan = [(method, strength) for method in self.prints for strength in self._strengths(method)]
        total = sum(len(self.topics) * (self.trials if strength else 1) for _, strength in plan)
        rows, wanted = [], None
        with tqdm(total=total, unit="topic", desc="texts", leave=False) as bar:
            for method, strength in plan:

                def perplexity_at(temperature, method=method, strength=strength):
                    made = pd.DataFrame(self._texts_at(method, strength, temperature, bar))
                    rows.append(made)
                    return perplexity_of(made)

                if strength:
                    tried = search_temperature(perplexity_at, wanted, TOLERANCE, self.trials)
                    bar.update(len(self.topics) * (self.trials - len(tried)))
                else:
                    wanted = perplexity_at(1.0)
        return pd.concat(rows, ignore_index=True)

    def control_of(self, topic: dict) -> TopicControl:
        name = topic["name"]
        if name not in self.controls:
            self.controls[name] = TopicControl(self.backpack, self.tokenizer, topic["steer"], largest=self.largest)
        return self.controls[name]

    def _strengths(self, method: str) -> list[float]:
        return [0, *sorted({float(s) for s in (self.strengths if method == BACKPACK else self.steps)} - {0})]

    def _texts_at(self, method: str, strength: float, temperature: float, bar) -> list[dict]:
        """Judged texts of all topics, written now or read from the folder. The same random numbers at all settings."""
        rows = []
        for number, topic in enumerate(self.topics):
            what = {
                "method": method, "models": self.prints, "strength": strength, "temperature": temperature,
                "topic": topic, "judge": self.judge_name,
                "prompts": self.prompts(topic["name"], self.samples), "tokens": self.tokens, "seed": self.seed + number,
            }  # fmt: skip

            def make(topic=topic, what=what):
                return self._write(method, strength, temperature, topic, what["prompts"], what["seed"])

            rows += cached_json(Path(self.folder) / "texts", what, make)
            bar.update()
        return rows if strength else self._on_every_topic(rows)

    def _on_every_topic(self, rows: list[dict]) -> list[dict]:
        """Texts without control, judged on every topic, if they all begin alike: each may be on any topic."""
        if len({prompt for topic in self.topics for prompt in self.prompts(topic["name"], self.samples)}) > 1:
            return rows
        texts = [row["text"] for row in rows]
        on_topic, counts = self.judge(texts), self.words.counts(texts)
        found = []
        for topic in self.topics:
            name = topic["name"]
            found += [
                row
                | {"topic": name, "on topic": bool(on_topic[name].iloc[n]), "topic words": int(counts[name].iloc[n])}
                | {"steering words": count_among(row["text"], topic["steer"])}
                for n, row in enumerate(rows)
            ]
        return found

    def _write(self, method, strength, temperature, topic, prompts, seed) -> list[dict]:
        began = time.perf_counter()
        if method == BACKPACK:
            texts = self.control_of(topic).at(strength).generate(prompts, self.tokens, seed, temperature=temperature)
        elif not strength:
            texts = continue_texts(
                self.transformer, self.tokenizer, prompts, self.tokens, seed, top_k=0, temperature=temperature
            )
        else:
            settings = pplm.Settings(step=strength, temperature=temperature)
            texts = pplm.generate(
                self.transformer, self.tokenizer, topic["steer"], prompts, self.tokens, seed, settings
            )
        seconds = (time.perf_counter() - began) / len(texts)
        reader = self.backpack if method == PPLM or self.transformer is None else self.transformer
        nats = log_probabilities(reader, self.tokenizer, prompts) - log_probabilities(reader, self.tokenizer, texts)
        written = [text[len(prompt) :] for text, prompt in zip(texts, prompts)]
        on_topic, counts = self.judge(written)[topic["name"]], self.words.counts(written)[topic["name"]]
        return [
            {
                "method": method, "strength": float(strength), "temperature": temperature,
                "topic": topic["name"], "text": text, "nats": nats[n].item(),
                "on topic": bool(on_topic.iloc[n]), "topic words": int(counts.iloc[n]),
                "tokens": len(ids_of_text(self.tokenizer, texts[n])) - len(ids_of_text(self.tokenizer, prompts[n])),
                "words": len(words_of(text)), "steering words": count_among(text, topic["steer"]),
                **dict(zip(("runs", "repeated runs"), repeated_runs(text))), "seconds": seconds,
            }
            for n, text in enumerate(written)
        ]  # fmt: skip


def perplexity_of(texts: pd.DataFrame) -> float:
    """Of texts, all tokens together."""
    return float(np.exp(texts["nats"].sum() / max(texts["tokens"].sum(), 1)))


# ---------------------------------------------------------------- what they show


def settings_table(texts: pd.DataFrame) -> pd.DataFrame:
    """A row for each method, strength and temperature: perplexity, also relative to no control; success, the mean over
    topics of the share of texts on their topic; words of the topic and words that steer, per 1,000; repetition, the
    share of runs of four words that the same text had before; and seconds a text.
    """
    rows = []
    for setting, made in texts.groupby(SETTING, sort=False):
        by_topic = made.groupby("topic")
        per_1000 = {
            f"{name} per 1,000": 1000 * (by_topic[name].sum() / by_topic["words"].sum().clip(lower=1)).mean()
            for name in ("topic words", "steering words")
        }
        rows.append(
            dict(zip(SETTING, setting))
            | {"perplexity": perplexity_of(made), "success": by_topic["on topic"].mean().mean()}
            | per_1000
            | {"repetition": made["repeated runs"].sum() / max(made["runs"].sum(), 1)}
            | {"seconds": made["seconds"].mean()}
        )
    table = pd.DataFrame(rows)
    none = table[table["strength"] == 0].set_index("method")["perplexity"]
    table.insert(4, "relative perplexity", table["perplexity"] / table["method"].map(none))
    return table


def at_equal_fluency(table: pd.DataFrame) -> pd.DataFrame:
    """Of each method and strength, the temperature tried whose perplexity is nearest to that of no control.

    `reached` says whether it is within `TOLERANCE`; where not, `why` says between which perplexities it was sought.
    """
    distance = table["relative perplexity"].map(np.log).abs()
    fair = table.loc[distance.groupby([table["method"], table["strength"]], sort=False).idxmin()].copy()
    fair["reached"] = (fair["relative perplexity"] - 1).abs() <= TOLERANCE
    tried = table.groupby(["method", "strength"])["relative perplexity"].agg(["min", "max", "size"])
    fair["why"] = [
        ""
        if row["reached"]
        else "{size:.0f} temperatures gave {min:.2f} to {max:.2f} times".format(
            **tried.loc[(row["method"], row["strength"])]
        )
        for _, row in fair.iterrows()
    ]
    return fair.reset_index(drop=True)


def of_setting(texts: pd.DataFrame, setting) -> pd.DataFrame:
    """The texts of a row of `settings_table`."""
    return texts[(texts[SETTING] == [setting[name] for name in SETTING]).all(axis=1)]


def chosen_elsewhere(texts: pd.DataFrame, fair: pd.DataFrame, method: str) -> tuple[pd.DataFrame, pd.Series]:
    """A method's texts on each topic, at the strength that does best on all *other* topics at equal fluency.

    Where no strength reached equal fluency, at the nearest that it came. -> texts, and the strength chosen for each
    topic.
    """
    usable = fair[(fair["method"] == method) & (fair["strength"] > 0)]
    usable = usable[usable["reached"]] if usable["reached"].any() else usable
    if usable.empty:
        return texts.iloc[:0], pd.Series(dtype=float)
    by_strength = {row["strength"]: of_setting(texts, row) for _, row in usable.iterrows()}
    shares = pd.DataFrame({s: made.groupby("topic")["on topic"].mean() for s, made in by_strength.items()})
    chosen = pd.Series(
        {topic: shares.drop(topic).mean().idxmax() if len(shares) > 1 else shares.columns[0] for topic in shares.index}
    )
    parts = [by_strength[s][by_strength[s]["topic"] == topic] for topic, s in chosen.items()]
    return pd.concat(parts, ignore_index=True), chosen


def paired_difference(one: pd.DataFrame, other: pd.DataFrame, seed: int = 0, resamples: int = 4000) -> dict[str, float]:
    """How much more often one method's texts are on topic than another's, paired over topics.

    difference: the mean over topics. low, high: 95 % bootstrap of topics and, in them, texts: for topics *like these*.
    low here, high here: of texts alone, for *these* topics. p: two-sided, by flipping the signs of topics' differences.
    """
    shared = sorted(set(one["topic"]) & set(other["topic"]))
    if not shared:
        return dict.fromkeys(("difference", "low", "high", "low here", "high here", "p"), np.nan)
    outcomes = [
        [made.loc[made["topic"] == topic, "on topic"].to_numpy(float) for topic in shared] for made in (one, other)
    ]
    rng = np.random.default_rng(seed)
    drawn = [np.array([rng.choice(of, (resamples, len(of))).mean(1) for of in topics]) for topics in outcomes]
    within = drawn[0] - drawn[1]  # (topics, resamples)
    picked = rng.integers(len(shared), size=within.shape)
    like_these = np.take_along_axis(within, picked, axis=0).mean(0)
    differences = np.array([a.mean() - b.mean() for a, b in zip(*outcomes)])
    flipped = (rng.choice([-1, 1], (resamples, len(shared))) * differences).mean(1)
    low, high = np.quantile(like_these, MIDDLE)
    low_here, high_here = np.quantile(within.mean(0), MIDDLE)
    return {
        "difference": float(differences.mean()), "low": float(low), "high": float(high),
        "low here": float(low_here), "high here": float(high_here),
        "p": p_value(np.abs(flipped), abs(differences.mean())),
    }  # fmt: skip


def responses(texts: pd.DataFrame, none: pd.DataFrame, seed: int = 0, resamples: int = 2000) -> pd.DataFrame:
    """How many times as many words of its topic texts have under control as without, a row for each topic.

    Every rate gets the same pseudo-rate, whatever the length of its texts. low, high: 95 % bootstrap over texts. p: how
    often texts of permuted labels differ as far in that direction; adjusted p: the same for as many topics as there are
    (Benjamini-Hochberg's), since some of many topics always seem to respond.
    """
    rng, rows = np.random.default_rng(seed), {}
    for topic in sorted(set(texts["topic"])):
        both = [made[made["topic"] == topic][["topic words", "words"]].to_numpy() for made in (texts, none)]
        drawn = _times(*(made[rng.integers(len(made), size=(resamples, len(made)))].sum(1) for made in both))
        found = _times(*(made.sum(0) for made in both))
        (low, high), p = np.quantile(drawn, MIDDLE), p_value(_permuted_times(*both, resamples, rng), found)
        rows[topic] = {"times": found, "low": float(low), "high": float(high), "p": p}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("topic")
    return table.assign(**{"adjusted p": stats.false_discovery_control(table["p"])})


def _permuted_times(ours: np.ndarray, theirs: np.ndarray, permutations: int, rng) -> np.ndarray:
    """What `times` would be if the texts' labels meant nothing; ours, theirs: (n, 2), words of the topic and words."""
    pooled = np.concatenate([ours, theirs])
    any_texts = (rng.choice(len(pooled), len(ours), replace=False, shuffle=False) for _ in range(permutations))
    drawn = np.array([pooled[places].sum(0) for places in any_texts])
    return _times(drawn, pooled.sum(0) - drawn)


def _times(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many times as often topic words come in ours as in theirs, each (..., 2) -> (...)."""
    return _rate(ours) / _rate(theirs)


def _rate(counts: np.ndarray) -> np.ndarray:
    """Topic words per word, (..., 2) -> (...), with the pseudo-rate."""
    return counts[..., 0] / np.maximum(counts[..., 1], 1) + PSEUDO_RATE
