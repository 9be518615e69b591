"""The models' cards: `card-*.md`, filled in from `evaluation.json`, `trials.csv` and `recipe.yaml`.

    python data/demo/cards.py

Every figure of a card comes from those files, so a card cannot say what was not measured.
"""

import json
from pathlib import Path
from string import Template

import pandas as pd

from backpack_lib.analysis.roles import find_roles
from backpack_lib.files import write_text
from backpack_lib.loading import SHIPPED

HERE = Path(__file__).resolve().parent
ARCHITECTURE_OF = {name: Path(place).name for name, place in SHIPPED.items()}


def write_cards():
    """Writes `README.md` into each model's folder."""
    found = json.loads((HERE / "evaluation.json").read_text())
    for name, architecture in ARCHITECTURE_OF.items():
        write_text(HERE / architecture / "README.md", card(found, name))


def card(found: dict, name: str) -> str:
    """The text of one model's card."""
    template = Template((HERE / f"card-{ARCHITECTURE_OF[name]}.md").read_text())
    return template.substitute(fields(found, name))


def fields(found: dict, name: str) -> dict[str, str]:
    """What the placeholders of a template stand for, for one model."""
    model = found["models"][name]
    return {
        "parameters": f"{model['parameters'] / 1e6:.1f}",
        "tokens_seen": f"{model['tokens_seen'] / 1e6:.1f}",
        "tokens_older": f"{model['tokens_of']['older'] / 1e6:.1f}",
        "tokens_plain": f"{model['tokens_of']['plain'] / 1e6:.1f}",
        "hours": f"{model['hours']:.1f}",
        "bits_per_byte": f"{model['bits_per_byte']:.3f}",
        "recipe": (HERE / "recipe.yaml").read_text().strip(),
        "machine": found["machine"],
        "versions": ", ".join(f"{package} {version}" for package, version in found["versions"].items()),
        "documents": str(found["text"]["documents"]),
        "pronoun_mass": f"{model['pronouns']['mass']:.0%}",
        "pronoun_ratio": f"{model['pronouns']['ratio']:.1f}",
        "pronoun_rho": "{rho:.2f} [{rho_low:.2f}, {rho_high:.2f}]".format(**model["pronouns"]),
        "figures": figures(found),
        "similarity": similarity(found),
        "held_out": held_out(found),
        "blimp_sets": blimp_sets(found),
        "trials": table(pd.read_csv(HERE / "trials.csv")),
        "roles": sense_table(model["roles"]) if "roles" in model else "",
        "samples": "\n\n".join(map(quoted, model["samples"])),
        "failures": "\n\n".join(f"{case['failure']}\n\n{quoted(case['text'])}" for case in model["failures"]),
    }


def quoted(text: str) -> str:
    """A text as a quotation of one paragraph."""
    return "> " + text.replace("\n", " ")


def figures(found: dict) -> str:
    """The main figures, one column for each model, and for what each was before the plain text."""
    rows = {
        "parameters (millions)": lambda m: f"{m['parameters'] / 1e6:.2f}",
        "tokens of training (millions)": lambda m: f"{m['tokens_seen'] / 1e6:.1f}",
        "bits per byte of validation text": lambda m: f"{m['bits_per_byte']:.3f}",
        f"BLiMP, accuracy over {found['blimp_pairs']:,} pairs": lambda m: f"{m['blimp']['mean']:.1%}",
        "word similarity, mean rho over the sets": lambda m: f"{mean_rho(m):.3f}",
        "p(he) + p(she) after a profession, mean": lambda m: f"{m['pronouns']['mass']:.1%}",
        "log p(he)/p(she) and the share of men, rho": lambda m: "{rho:.2f} [{rho_low:.2f}, {rho_high:.2f}]".format(
            **m["pronouns"]
        ),
        "training, tokens per second": lambda m: speed(m, "training"),
        "generation, tokens per second": lambda m: speed(m, "generation"),
    }
    models = found["models"] | {
        f"{name}, before the plain text": model | {"tokens_seen": found["models"][name]["tokens_of"]["older"]}
        for name, model in found.get("before", {}).items()
    }
    columns = {name: {label: show(model) for label, show in rows.items()} for name, model in models.items()}
    return table(pd.DataFrame(columns).rename_axis("").reset_index())


def speed(model: dict, of: str) -> str:
    """Tokens per second; empty for what a model was before, whose speed is the same."""
    key = f"{of}_tokens_per_second"
    return f"{model[key]:,.0f}" if key in model else ""


def mean_rho(model: dict) -> float:
    """The mean over the sets of the held-out choice of similarity."""
    sets = model["similarity_held_out"]
    return sum(row["rho"] for row in sets.values()) / len(sets)


def similarity(found: dict) -> str:
    """Spearman's rho of every similarity on every set: the Backpack's, then those of the others."""
    parts = _with_word2vec(found, "similarity")
    tables = []
    for name, columns in parts.items():
        values = pd.DataFrame(columns)
        values.index = [name if len(values) == 1 else f"{name}, {row}" for row in values.index]
        tables.append(values)
    return table(pd.concat(tables).map("{:.3f}".format).rename_axis("similarity").reset_index())


def held_out(found: dict) -> str:
    """Spearman's rho of each model's best similarity where it was not picked, with its interval."""
    parts = _with_word2vec(found, "similarity_held_out")
    columns = {
        name: {
            set_name: f"{row['rho']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            + (f", {row['chosen']}" if "folds" in row["chosen"] else "")
            for set_name, row in rows.items()
        }
        for name, rows in parts.items()
    }
    return table(pd.DataFrame(columns).rename_axis("set").reset_index())


def _with_word2vec(found: dict, measure: str) -> dict:
    """A measure of each model, and of word2vec where it was trained."""
    parts = {name: model[measure] for name, model in found["models"].items()}
    return parts | ({"word2vec": found["word2vec"][measure]} if "word2vec" in found else {})


def blimp_sets(found: dict) -> str:
    """The five sets of BLiMP that the Backpack does best and worst."""
    by_set = pd.DataFrame({name: model["blimp"]["by_set"] for name, model in found["models"].items()})
    ordered = by_set.sort_values("demo", ascending=False)
    ends = pd.concat([ordered.head(5), ordered.tail(5)]).map("{:.0%}".format)
    return table(ends.rename_axis("set").reset_index())


def sense_table(evidence: dict) -> str:
    """One line for each sense: its role, the evidence, and its AUC in every relation; the last line is the null."""
    auc = pd.DataFrame(evidence["auc"])
    found = find_roles(auc)
    pronouns = pd.DataFrame(evidence["pronouns"])
    lines = auc.map("{:.2f}".format)
    lines.insert(0, "what it does", [_role(row) for row in found.itertuples()])
    lines["he/she and profession: rho (push)"] = [_pronouns(row, len(pronouns)) for row in pronouns.itertuples()]
    untrained = pd.DataFrame(evidence["auc_untrained"])
    extreme = untrained.apply(lambda column: column[(column - 0.5).abs().idxmax()])
    lines.loc["untrained"] = ["", *extreme.map("{:.2f}".format), ""]
    return table(lines.rename_axis("sense").reset_index())


def _pronouns(row, n_tests: int) -> str:
    shown = f"{row.rho:.2f} ({row.push:.2f})"
    return f"**{shown}**" if row.p * n_tests < 0.05 else shown


def _role(row) -> str:
    if pd.isna(row.auc):
        return row.role
    return f"**{row.role}** (AUC {row.auc:.2f}, {row.lead:+.1f} sd)"


def table(frame: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    write_cards()
