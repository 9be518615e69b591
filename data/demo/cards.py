"""The models' cards: `card-*.md`, filled in from `evaluation.json`, so that no card says what was not measured.

python data/demo/cards.py
"""

import json
from pathlib import Path

import pandas as pd

from backpack_lib.analysis.roles import find_roles
from backpack_lib.display.tables import markdown
from backpack_lib.files import write_text
from backpack_lib.loading import SHIPPED

HERE = Path(__file__).resolve().parent
ARCHITECTURE_OF = {name: Path(place).name for name, place in SHIPPED.items() if place.startswith("demo/")}


def write_cards():
    """Writes `README.md` into each model's folder."""
    evaluation = json.loads((HERE / "evaluation.json").read_text())
    for name, architecture in ARCHITECTURE_OF.items():
        write_text(HERE / architecture / "README.md", card(evaluation, name))


def card(evaluation: dict, name: str) -> str:
    """The text of one model's card."""
    model = evaluation["models"][name]
    columns = {name: figures(model) for name, model in evaluation["models"].items()}
    if "word2vec" in evaluation:
        columns["word2vec"] = similarity(evaluation["word2vec"])
    read = {**model["tokens_of"], "parameters": model["parameters"]}
    cases = [f"{case['failure']}\n\n{quoted(case['text'])}" for case in model["failures"]]
    template = (HERE / f"card-{ARCHITECTURE_OF[name]}.md").read_text()
    return template.format(
        **model,
        evaluation=evaluation,
        millions={key: value / 1e6 for key, value in read.items()},
        figures=markdown(pd.DataFrame(columns).fillna("")),
        senses=sense_table(model["roles"]) if "roles" in model else "",
        texts="\n\n".join(map(quoted, model["samples"])),
        cases="\n\n".join(cases),
    )


def quoted(text: str) -> str:
    return "> " + text.replace("\n", " ")


def figures(model: dict) -> dict[str, str]:
    """The numbers that people ask for."""
    pronouns = model["pronouns"]
    return {
        "parameters (millions)": f"{model['parameters'] / 1e6:.2f}",
        "tokens of training (millions)": f"{model['tokens_seen'] / 1e6:.1f}",
        "bits per byte of validation text": f"{model['bits_per_byte']:.3f}",
        "grammar (BLiMP): accuracy": f"{model['blimp']['mean']:.1%}",
        **similarity(model),
        "p(he) + p(she) after a profession": f"{pronouns['mass']:.1%}",
        "log p(he)/p(she) and the share of men: rho": "{rho:.2f} [{rho_low:.2f}, {rho_high:.2f}]".format(**pronouns),
    }


def similarity(model: dict) -> dict[str, str]:
    rows = pd.DataFrame(model["similarity_held_out"]).loc[["rho", "low", "high"]].astype(float)
    return {f"word similarity, {name}: rho": "{:.2f} [{:.2f}, {:.2f}]".format(*rows[name]) for name in rows}


def sense_table(evidence: dict) -> str:
    """One line for each sense: its role, and its AUC in every relation; the last line is the null."""
    auc, untrained = pd.DataFrame(evidence["auc"]), pd.DataFrame(evidence["auc_untrained"])
    lines = auc.map("{:.2f}".format)
    lines.insert(0, "what it does", find_roles(auc)["role"])
    lines.loc["untrained"] = ["", *(f"{column[(column - 0.5).abs().idxmax()]:.2f}" for _, column in untrained.items())]
    return markdown(lines.rename_axis("sense"))


if __name__ == "__main__":
    write_cards()
