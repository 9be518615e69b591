"""Teaching a model by a few canonical examples: a vector added to a few senses, against changing all weights.

    taught = SenseTeaching(model, tokenizer, examples, background)
    share = bounded_share(model, taught.applied, background, eps=1e-3)  # the loss there rises by a share of at most eps
    edits = taught.edits(share)                                         # a SenseEdits

After Hewitt et al. (2024). Weights (alpha) do not see senses. So after every text a logit is linear in the added
vectors, all losses here are convex in them, and nothing has to be run again while they are fitted.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.knowledge import read_table
from backpack_lib.analysis.scores import batches, next_log_probabilities, readings, token_nats
from backpack_lib.files import as_seen, data_folder
from backpack_lib.model.kinds import require_senses
from backpack_lib.text.words import tokens_of_word
from backpack_lib.text.writing import ids_of_text, pad_rows

COLUMNS = ["set", "kind", "use", "prompt", "target", "contrast"]
KINDS = ("say", "prefer", "balance")
BALANCED = math.log(1.5)  # nats; two words are as likely as each other if their log-odds stay within this
CHOSEN, BACKGROUND_WEIGHT = 8, 1000.0  # (token, sense) pairs for each example, and how much the background counts
KL_OF_SENSES, KL_OF_WEIGHTS = 10.0, 1.0  # how much a nat of divergence on general text counts beside the examples
RIDGE, FIT_STEPS = 1e-4, 60  # of the fit of added vectors
STEPS = 30  # of finetuning
HALVINGS = 8  # of the interval in which the share is searched that a bound allows


# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Examples:
    """Prompts with a token to follow."""

    kind: str  # "say": the target, likelier than all contrasts; "prefer": likelier than its contrast; "balance": as likely
    prompts: list[str]
    targets: torch.Tensor  # (n,)
    contrasts: torch.Tensor  # (n, m)

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, numbers) -> "Examples":
        """Some of the examples."""
        prompts = [self.prompts[n] for n in numbers]
        return Examples(self.kind, prompts, self.targets[list(numbers)], self.contrasts[list(numbers)])

    def margins(self, log_probs: torch.Tensor) -> torch.Tensor:
        """How much likelier the target is than the likeliest contrast, from log-probabilities (n, V), in nats, (n,)."""
        device = log_probs.device
        target = log_probs.gather(1, self.targets.to(device)[:, None])[:, 0]
        return target - log_probs.gather(1, self.contrasts.to(device)).amax(1)

    def losses(self, log_probs: torch.Tensor) -> torch.Tensor:
        """What is made small, for each example, (n,)."""
        if self.kind == "say":
            return -log_probs.gather(1, self.targets.to(log_probs.device)[:, None])[:, 0]
        margin = self.margins(log_probs)
        return margin**2 if self.kind == "balance" else F.softplus(-margin)

    def solved_by(self, model, tokenizer) -> np.ndarray:
        """Whether the model does each example as it should be, (n,)."""
        margin = self.margins(next_log_probabilities(model, tokenizer, self.prompts)).cpu().numpy()
        return abs(margin) < BALANCED if self.kind == "balance" else margin > 0


def read_examples(file: str | Path = "") -> pd.DataFrame:
    """A table like `data/canonical.csv`."""
    file = as_seen(file) or data_folder() / "canonical.csv"
    table = read_table(file, COLUMNS)
    if unknown := sorted({*table["kind"]} - {*KINDS}):
        raise ValueError(f"{str(file)!r} has examples of the kind {unknown[0]!r}; choose from {', '.join(KINDS)}.")
    return table


def make_examples(tokenizer, table: pd.DataFrame, use: str) -> Examples:
    """The rows of one set that are for one use; those whose target or contrast is not one token are left out.

    Without a contrast, all other targets of the set are contrasts.
    """
    tokens = {}
    for word in {*table["target"], *table["contrast"]} - {""}:
        if len(ids := tokens_of_word(tokenizer, word)) == 1:
            tokens[word] = ids[0]
    table = table[table["target"].isin(tokens) & table["contrast"].isin([*tokens, ""])]
    targets = sorted({tokens[word] for word in table["target"]})
    table = table[table["use"] == use]
    contrasts = []
    for row in table.itertuples():
        others = [token for token in targets if token != tokens[row.target]]
        contrasts.append([tokens[row.contrast]] if row.contrast else others)
    kind = table["kind"].iloc[0] if len(table) else KINDS[0]
    of_target = torch.tensor([tokens[word] for word in table["target"]], dtype=torch.long)
    return Examples(kind, list(table["prompt"]), of_target, torch.tensor(contrasts))


# ---------------------------------------------------------------- general text, and a bound on its loss


def general_loss(model, rows: list[list[int]]) -> float:
    """Mean loss in nats per token on rows of token ids, which begin with an end-of-text token."""
    return torch.cat(token_nats(model, rows)).mean().item()


def rows_of_texts(model, tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as rows of token ids, cut to the model's context."""
    rows = [ids_of_text(tokenizer, text)[: model.config.max_position_embeddings] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("There is no general text to hold the model to; give at least one that is not empty.")
    return rows


def check_bound(eps: float):
    """Refuses an eps that no change can meet, that bounds nothing, or that is no number."""
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise ValueError(f"The bound {eps!r} on the rise of the loss should be a finite number above 0, such as 0.001.")


def bounded_share(model, applied: Callable, background: list[list[int]], eps: float) -> float:
    """The largest share of a change, 0 to 1, at which the loss on general text rises by a share of at most eps.

    applied: from a share to a context in which the model has that share of the change. Found by halving an interval,
    so to within 2^-`HALVINGS`.
    """
    check_bound(eps)
    bound = (1 + eps) * general_loss(model, background)

    def is_within(share: float) -> bool:
        with applied(share):
            return general_loss(model, background) <= bound

    if is_within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if is_within(middle):
            low = middle
        else:
            high = middle
    return low


# ---------------------------------------------------------------- senses


class SenseTeaching:
    """Vectors added to a few senses of a few tokens, fitted to examples; all else stays.

    background: rows of general text (`rows_of_texts`). chosen: how many (token, sense) pairs each example may change:
    those with most weight in it, less `background_weight` times their mean weight in general text. The fit makes the
    mean loss of the examples small, and with it the divergence from the model as it was, in nats per token of general
    text.

    pairs: what was chosen, each (token, sense). added: the vectors, (m, d).
    """

    def __init__(
        self, model, tokenizer, examples: Examples, background: list[list[int]], chosen: int = CHOSEN,
        background_weight: float = BACKGROUND_WEIGHT,
    ):  # fmt: skip
        require_senses(model)
        self.model, self.tokenizer = model, tokenizer
        texts, logits = weights_and_logits(model, tokenizer, examples.prompts)
        self.pairs = choose_pairs(texts, mean_weights(model, background), chosen, background_weight)
        here = weights_of_pairs(texts, self.pairs)
        n_tokens = sum(len(row) - 1 for row in background)
        self.added = self._fit(examples, here, logits, *self._in_background(background), n_tokens)

    @torch.no_grad()
    def _in_background(self, background: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the pairs, and logits, where the pairs reach the general text, (P, m), (P, V)."""
        tokens, senses = torch.tensor(self.pairs, device=self.model.device).T
        weights, logits = [], []
        for _, ids, mask in batches(self.model, background):
            out = self.model(ids, attention_mask=mask, output_senses=True, use_cache=False)
            stands = (ids[..., None] == tokens).float()  # (B, T, m): where a pair's token is
            of_pairs = torch.einsum("bmij,bjm->bim", out.contextualization[:, senses].float(), stands)
            reached = (of_pairs.sum(-1) > 0) & mask.bool()
            weights.append(of_pairs[reached])
            logits.append(out.logits[reached].float())
        return torch.cat(weights), torch.cat(logits)

    def _fit(self, examples, here, logits, there, general, n_tokens) -> torch.Tensor:
        E = self.model.get_output_embeddings().weight.detach().float() * getattr(self.model, "logit_scale", 1.0)
        here, logits, there = here.to(E), logits.to(E), there.to(E)
        before = general.log_softmax(-1)
        added = torch.zeros(len(self.pairs), E.shape[1], device=E.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([added], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            loss = examples.losses((logits + here @ added @ E.T).log_softmax(-1)).mean()
            if len(there):
                after = (general + there @ added @ E.T).log_softmax(-1)
                loss = loss + KL_OF_SENSES * F.kl_div(after, before, reduction="sum", log_target=True) / n_tokens
            loss = loss + RIDGE * added.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        return added.detach()

    def edits(self, share: float = 1.0) -> SenseEdits:
        """The added vectors, or a share of them, as edits."""
        edits = SenseEdits(self.model, self.tokenizer, "taught by examples")
        for token in dict.fromkeys(token for token, _ in self.pairs):
            rows = [row for row, (other, _) in enumerate(self.pairs) if other == token]
            edits.add(token, [self.pairs[row][1] for row in rows], share * self.added[rows].cpu())
        return edits

    def applied(self, share: float = 1.0) -> AbstractContextManager:
        """A context in which the model has a share of the added vectors."""
        return self.edits(share).applied()


@torch.no_grad()
def mean_weights(model, rows: list[list[int]]) -> torch.Tensor:
    """How much weight each sense of each token has in general text: the mean over all places, (V, k)."""
    total, places = torch.zeros(model.config.vocab_size, model.config.num_senses, device=model.device), 0
    for _, ids, mask in batches(model, rows):
        out = model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        of_sources = (out.contextualization.float() * mask[:, None, :, None]).sum(2)  # (B, k, T)
        total.index_add_(0, ids.flatten(), of_sources.transpose(1, 2).flatten(0, 1))
        places += int(mask.sum())
    return total.cpu() / places


def weights_and_logits(model, tokenizer, prompts: list[str]) -> tuple[list[tuple], torch.Tensor]:
    """What goes into each prompt's last prediction: its ids, (T,), and their senses' weights, (T, k); logits, (n, V)."""
    texts, logits = [], []
    for ids, reading in readings(model, tokenizer, prompts):
        texts.append((torch.tensor(ids), reading.weights.float().cpu()))
        logits.append(reading.logits.float())
    return texts, torch.stack(logits)


def weights_of_pairs(texts: list[tuple], pairs: list[tuple[int, int]]) -> torch.Tensor:
    """The weight of each (token, sense) pair in each text's last prediction, (n, m); texts: of `weights_and_logits`."""
    tokens, senses = torch.tensor(pairs).T
    rows = [((ids[:, None] == tokens) * weights[:, senses]).sum(0) for ids, weights in texts]
    return torch.stack(rows)


def choose_pairs(texts, mean: torch.Tensor, chosen: int, background_weight: float) -> list[tuple[int, int]]:
    """The (token, sense) pairs to change: for each text the `chosen` furthest above their background weight.

    texts: of `weights_and_logits`. mean: weights in general text, (V, k).
    """
    pairs = {}
    for ids, weights in texts:
        tokens, places = ids.unique(return_inverse=True)
        here = torch.zeros(len(tokens), weights.shape[1]).index_add_(0, places, weights)
        score = here - background_weight * mean[tokens]
        for place in score.flatten().topk(min(chosen, score.numel())).indices.tolist():
            row, sense = divmod(place, score.shape[1])
            pairs[int(tokens[row]), sense] = None
    return list(pairs)


# ---------------------------------------------------------------- all weights, or LoRA


def finetune(
    model, tokenizer, examples: Examples, background: list[list[int]], lora: bool = False, learning_rate: float = 1e-4,
    until: float | None = None, seed: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The change of each weight after finetuning a copy of a model by AdamW. The model stays as it is.

    lora: low-rank updates by peft (rank 8, of attention, MLPs and sense network), instead of all weights. Each step
    looks at one batch of the general text, too. until: stops once all examples' margins reach it (nats).
    """
    taught = copy.deepcopy(model)
    start = {name: weight.detach().clone() for name, weight in taught.named_parameters()}
    learner = _with_lora(taught, seed) if lora else taught
    optimizer = torch.optim.AdamW([w for w in learner.parameters() if w.requires_grad], learning_rate, weight_decay=0.0)
    rows = [ids_of_text(tokenizer, prompt) for prompt in examples.prompts]
    ids, mask = (table.to(model.device) for table in pad_rows(rows, tokenizer.eos_token_id, left=True))
    general = [batch for _, *batch in batches(model, background)]
    with torch.no_grad():
        as_it_was = [_log_probs(model, *batch) for batch in general]
    for step in range(STEPS):
        logits = learner(ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        log_probs = logits.float().log_softmax(-1)
        if until is not None and (examples.margins(log_probs.detach()) >= until).all():
            break
        before, after = as_it_was[step % len(general)], _log_probs(learner, *general[step % len(general)])
        divergence = F.kl_div(after, before, reduction="batchmean", log_target=True)
        loss = examples.losses(log_probs).mean() + KL_OF_WEIGHTS * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if lora:
        taught = learner.merge_and_unload()
    return {name: weight.detach() - start[name] for name, weight in taught.named_parameters() if name in start}


@contextmanager
def changed(model, change: dict[str, torch.Tensor], share: float = 1.0) -> Iterator:
    """A model with a share of a change of its weights, for as long as the `with` lasts."""
    weights = dict(model.named_parameters())
    kept = {name: weights[name].detach().clone() for name in change}
    try:
        with torch.no_grad():
            for name, delta in change.items():
                weights[name].add_(delta, alpha=share)
        yield model
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                weights[name].copy_(weight)


def _with_lora(model, seed: int):
    from peft import LoraConfig, get_peft_model  # the extra `lora`
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    conv = [name for name, part in model.named_modules() if isinstance(part, Conv1D)]
    with warnings.catch_warnings():  # peft asks transformers by a name that is going out of use
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=conv, fan_in_fan_out=True))


def _log_probs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probabilities at each token of a batch of general text, (P, V)."""
    return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float().log_softmax(-1)
