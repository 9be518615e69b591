"""Texts of topic control and of PPLM, written and judged: what 03_topic_control compares at equal fluency.

    study = TopicStudy(control=..., transformer=..., topics=[...], judge=..., prompts=..., folder="runs/topics", ...)
    texts = study.texts_at("Backpack", strength=2, temperature=1.2)    # a row a judged text

More weight on some senses makes texts more predictable, and so does a lower temperature. So methods are compared where
their texts have the perplexity of texts without control, under a model that did not write them: `next_temperature`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from backpack_lib.analysis import pplm
from backpack_lib.analysis.scores import token_nats
from backpack_lib.analysis.topic import TopicControl
from backpack_lib.files import cached_json
from backpack_lib.loading import fingerprint
from backpack_lib.studies.text_quality import WordJudge, count_among, repeated_runs, words_of
from backpack_lib.text.writing import continue_texts, ids_of_text

BACKPACK, PPLM = "Backpack", "PPLM"
TEMPERATURES = (0.3, 2.0)  # sought between these
USUAL_SLOPE = 6.0  # of log-perplexity over temperature, near temperature 1


@dataclass(kw_only=True)
class TopicStudy:
    """What is written, and how it is judged. A text is kept in the folder as soon as it is written."""

    control: TopicControl  # of the Backpack, or lens, toward any topic
    transformer: object | None  # for PPLM, and to read the Backpack's texts, which it reads itself without one
    topics: list[dict]  # `name`, the words that steer toward it, `steer`, and others by which it is known, `words`
    judge: Callable[[list[str]], pd.DataFrame]  # texts -> booleans, texts x topic names
    prompts: Callable[[str, int], list[str]]  # (topic name, n) -> n beginnings
    folder: Path
    samples: int
    tokens: int
    seed: int = 0

    def __post_init__(self):
        self.backpack, self.tokenizer = self.control.model, self.control.tokenizer
        self.words, self.controls = WordJudge(self.topics), {}
        self.prints = {BACKPACK: fingerprint(self.backpack)}
        if self.transformer is not None:
            self.prints[PPLM] = fingerprint(self.transformer)
        prompts = {prompt for topic in self.topics for prompt in self.prompts(topic["name"], self.samples)}
        self.begin_alike = len(prompts) == 1

    def texts_at(self, method: str, strength: float, temperature: float) -> pd.DataFrame:
        """Judged texts, with the same random numbers at every setting: a row a text and topic that it is judged on.

        strength: of the Backpack's control, or the step of PPLM; 0 is no control. Texts without control that all begin
        alike are judged on every topic, since each may be on any of them.

        Columns: method, strength, temperature, topic, text; nats and tokens, under the model that reads; on topic,
        topic words and steering words; words, runs (of four words) and repeated runs; seconds, and the model's weights.
        """
        parts = []
        for number, topic in enumerate(self.topics):
            written = self._written(method, float(strength), temperature, topic, self.seed + number)
            parts.append(pd.DataFrame(written).assign(topic=topic["name"]))
        texts = pd.concat(parts, ignore_index=True)
        on_topic, topic_words = self.judge(list(texts["text"])), self.words.counts(list(texts["text"]))
        parts = []
        for topic in self.topics:
            name = topic["name"]
            own = texts if strength == 0 and self.begin_alike else texts[texts["topic"] == name]
            judged = {
                "topic": name,
                "on topic": on_topic.loc[own.index, name].astype(bool),
                "topic words": topic_words.loc[own.index, name],
                "steering words": [count_among(text, topic["steer"]) for text in own["text"]],
            }
            parts.append(own.assign(**judged))
        setting = {"method": method, "strength": float(strength), "temperature": temperature}
        return pd.concat(parts, ignore_index=True).assign(**setting, model=self.prints[method])

    def control_of(self, topic: dict) -> TopicControl:
        if topic["name"] not in self.controls:
            self.controls[topic["name"]] = self.control.toward(topic["steer"])
        return self.controls[topic["name"]]

    def _written(self, method: str, strength: float, temperature: float, topic: dict, seed: int) -> list[dict]:
        """A topic's texts, written now or read from the folder."""
        prompts = self.prompts(topic["name"], self.samples)
        what = {"method": method, "models": self.prints, "strength": strength, "temperature": temperature}
        what |= {"steer": topic["steer"], "prompts": prompts, "tokens": self.tokens, "seed": seed}

        def write():
            began = time.perf_counter()
            texts = self._continued(method, strength, temperature, topic, prompts, seed)
            seconds = (time.perf_counter() - began) / len(texts)
            return [row | {"seconds": seconds} for row in self._read(method, prompts, texts)]

        return cached_json(Path(self.folder) / "texts", what, write)

    def _continued(self, method, strength, temperature, topic, prompts, seed) -> list[str]:
        if method == BACKPACK:
            control = self.control_of(topic).at(strength)
            return control.generate(prompts, self.tokens, seed, temperature=temperature)
        writer = self.transformer, self.tokenizer
        if not strength:
            return continue_texts(*writer, prompts, self.tokens, seed, top_k=0, temperature=temperature)
        settings = pplm.Settings(step=strength, temperature=temperature)
        return pplm.generate(*writer, topic["steer"], prompts, self.tokens, seed, settings)

    def _read(self, method: str, prompts: list[str], texts: list[str]) -> list[dict]:
        """What stands after each prompt, and how likely it is to a model that did not write it."""
        reader = self.backpack if method == PPLM or self.transformer is None else self.transformer
        nats = token_nats(reader, [ids_of_text(self.tokenizer, text) for text in texts])
        rows = []
        for prompt, text, losses in zip(prompts, texts, nats):
            losses = losses[len(ids_of_text(self.tokenizer, prompt)) - 1 :]
            row = {"text": text[len(prompt) :], "nats": losses.sum().item(), "tokens": len(losses)}
            row["words"] = len(words_of(row["text"]))
            row["runs"], row["repeated runs"] = repeated_runs(row["text"])
            rows.append(row)
        return rows


def next_temperature(tried: dict[float, float], wanted: float) -> float:
    """The temperature to try next for a wanted perplexity, from those tried and their perplexities.

    It is where a line meets the wanted log-perplexity: through the two that came nearest, or, of one, with the usual
    slope. It may be one that was tried: then no temperature between `TEMPERATURES` comes nearer.
    """
    gaps = {temperature: np.log(perplexity / wanted) for temperature, perplexity in tried.items()}
    nearest, *others = sorted(gaps, key=lambda temperature: abs(gaps[temperature]))
    slope = USUAL_SLOPE
    if others:
        slope = (gaps[nearest] - gaps[others[0]]) / (nearest - others[0])
    # A flat line, or one that falls by chance, would lead far away.
    temperature = nearest - gaps[nearest] / max(slope, USUAL_SLOPE / 4)
    return round(float(np.clip(temperature, *TEMPERATURES)), 3)
