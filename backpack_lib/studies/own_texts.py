"""Texts that several models write about the same, so that none is judged on its own alone."""

from pathlib import Path

from backpack_lib.files import cached_json
from backpack_lib.text.writing import continue_texts


def written_by_each(
    models: dict, prints: dict, tokenizer, prompts: list[str], tokens: int, folder: Path, sampling: dict | None = None,
    seed: int = 0,
) -> list[str]:  # fmt: skip
    """Each prompt continued by each of the models, by name; kept in `folder / "texts"` by their fingerprints."""
    what = {"models": prints, "about": list(prompts), "tokens": tokens, "sampling": sampling, "seed": seed}

    def make():
        settings = sampling or {}
        written = [continue_texts(net, tokenizer, list(prompts), tokens, seed, **settings) for net in models.values()]
        return sum(written, [])

    return cached_json(Path(folder) / "texts", what, make)
