"""Teaching a model by a few canonical examples: a vector added to a few senses, against changing all weights.

    taught = SenseTeaching(model, tokenizer, examples, background)
    edits = taught.edits(eps=1e-3)             # a SenseEdits; the loss on general text rises by a share of at most eps

After Hewitt et al. (2024). Weights (alpha) do not see senses. So after every text a logit is linear in the added
vectors, all losses here are convex in them, and nothing has to be run again while they are fitted.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from backpack_lib.analysis.edits import SenseEdits
from backpack_lib.analysis.scores import batches, next_log_probabilities, prompt_batches, token_nats
from backpack_lib.files import as_seen, data_folder, first_line
from backpack_lib.model.kinds import require_senses
from backpack_lib.text.words import tokens_of_word
from backpack_lib.text.writing import ids_of_text, pad_rows

COLUMNS = ["set", "kind", "use", "prompt", "target", "contrast"]
KINDS = ("say", "prefer", "balance")
BALANCED = math.log(1.5)  # nats; two words are as likely as each other if their log-odds stay within this
CHOSEN, BACKGROUND_WEIGHT = 8, 1000.0  # (token, sense) pairs for each example, and how much the background counts


@dataclass(frozen=True)
class Examples:
    """Prompts with a token to follow.

    kind: "say" (the target should be likely: likelier than all of the contrasts), "prefer" (likelier than its
    contrast), or "balance" (as likely as its contrast). contrasts: tokens for each prompt, (n, m).

    Raises ValueError for no examples, another kind, or lists of different lengths.
    """

    kind: str
    prompts: list[str]
    targets: torch.Tensor
    contrasts: torch.Tensor

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}.")
        if not self.prompts:
            raise ValueError("There are no examples to learn from; give at least one.")
        if not len(self.prompts) == len(self.targets) == len(self.contrasts):
            raise ValueError("Each example needs a prompt, a target and contrasts; their numbers differ.")

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, numbers) -> "Examples":
        """Some of the examples."""
        numbers = torch.as_tensor(numbers)
        prompts = [self.prompts[n] for n in numbers.tolist()]
        return Examples(self.kind, prompts, self.targets[numbers], self.contrasts[numbers])

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

    def success(self, log_probs: torch.Tensor) -> np.ndarray:
        """Whether each example is as it should be, (n,)."""
        margin = self.margins(log_probs).cpu().numpy()
        return abs(margin) < BALANCED if self.kind == "balance" else margin > 0

    def solved_by(self, model, tokenizer) -> np.ndarray:
        """`success` under a model as it is now."""
        return self.success(next_log_probabilities(model, tokenizer, self.prompts))


def read_examples(file: str | Path = "") -> pd.DataFrame:
    """A table like `data/canonical.csv`. Raises ValueError for a file that cannot be read or lacks a column."""
    file = as_seen(file) or data_folder() / "canonical.csv"
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"The examples in {str(file)!r} cannot be read: {first_line(error)}") from error
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{str(file)!r} lacks the column {missing[0]!r}; it should have {', '.join(COLUMNS)}.")
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
    contrasts = [
        [tokens[row.contrast]] if row.contrast else [one for one in targets if one != tokens[row.target]]
        for row in table.itertuples()
    ]
    kind = table["kind"].iloc[0] if len(table) else KINDS[0]
    of_target = torch.tensor([tokens[word] for word in table["target"]], dtype=torch.long)
    return Examples(kind, list(table["prompt"]), of_target, torch.tensor(contrasts))


# ---------------------------------------------------------------- general text


def general_loss(model, rows: list[list[int]]) -> float:
    """Mean loss in nats per token on rows of token ids, which begin with an end-of-text token."""
    return torch.cat(token_nats(model, rows)).mean().item()


def rows_of_texts(model, tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as rows of token ids, cut to the model's context. Raises ValueError if there is none."""
    rows = [ids_of_text(tokenizer, text)[: model.config.n_positions] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("There is no general text to hold the model to; give at least one that is not empty.")
    return rows


def walk_back(loss_at: Callable[[float], float], start: float, eps: float, steps: int = 8) -> float:
    """The largest share of a change, 0 to 1, at which the loss is at most (1 + eps) times the one without it.

    loss_at: of a share. start: the loss at share 0. Found by halving an interval, so to within 2^-steps.

    Raises ValueError for an eps that no change can meet, or that is no number.
    """
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps} cannot be met: a bound on the rise of the loss should be above 0, such as 0.001.")
    bound = (1 + eps) * start
    if loss_at(1.0) <= bound:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if loss_at(middle) <= bound else (low, middle)
    return low


# ---------------------------------------------------------------- senses


class SenseTeaching:
    """Vectors added to a few senses of a few tokens, fitted to examples; all else stays.

    background: rows of general text (`rows_of_texts`). chosen: how many (token, sense) pairs each example may change:
    those with most weight in it, less `background_weight` times their mean weight in general text. kl_weight: how much
    the divergence from the model as it was, in nats per token of general text, counts beside the mean loss of the
    examples.

    pairs: what was chosen, each (token, sense). added: the vectors, (m, d).

    Raises ValueError for a model that is no Backpack.
    """

    def __init__(
        self, model, tokenizer, examples: Examples, background: list[list[int]], chosen: int = CHOSEN,
        background_weight: float = BACKGROUND_WEIGHT, kl_weight: float = 10.0, ridge: float = 1e-4, steps: int = 60,
    ):  # fmt: skip
        require_senses(model)
        self.model, self.tokenizer, self.background = model, tokenizer, background
        self.start = general_loss(model, background)
        mean = mean_weights(model, background)
        of_examples, hidden = weights_in(model, tokenizer, examples.prompts)
        self.pairs = choose_pairs(of_examples, mean, chosen, background_weight)
        here = torch.stack([w[self._columns()] for w in of_examples])  # (n, m)
        there, general = self._in_background()
        self.added = self._fit(examples, here, hidden, there, general, kl_weight, ridge, steps)

    def _columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.tensor(one) for one in zip(*self.pairs))

    @torch.inference_mode()
    def _in_background(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the pairs and hidden states, where they reach the general text, (P, m), (P, d)."""
        tokens, senses = (one.to(self.model.device) for one in self._columns())
        weights, states = [], []
        for _, ids, mask in batches(self.model, self.background):
            out = self.model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
            # alpha summed over the places where a pair's token stands: (B, k, T, T), (B, T, m) -> (B, T, m)
            found = torch.einsum(
                "bmij,bjm->bim", out.contextualization[:, senses].float(), (ids[..., None] == tokens).float()
            )
            reached = (found.sum(-1) > 0) & mask.bool()
            weights.append(found[reached])
            states.append(out.last_hidden_state[reached].float())
        return torch.cat(weights), torch.cat(states)

    def _fit(self, examples, here, hidden, there, general, kl_weight, ridge, steps) -> torch.Tensor:
        E = self.model.get_output_embeddings().weight.detach().float()
        here, hidden, there, general = (x.clone().to(E) for x in (here, hidden, there, general))
        before = (general @ E.T).log_softmax(-1)
        n_tokens = sum(len(row) - 1 for row in self.background)
        added = torch.zeros(len(self.pairs), E.shape[1], device=E.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([added], max_iter=steps, line_search_fn="strong_wolfe")

        def objective():
            optimizer.zero_grad()
            loss = examples.losses(((hidden + here @ added) @ E.T).log_softmax(-1)).mean()
            if len(there):
                after = ((general + there @ added) @ E.T).log_softmax(-1)
                loss = loss + kl_weight * F.kl_div(after, before, reduction="sum", log_target=True) / n_tokens
            loss = loss + ridge * added.square().sum()
            loss.backward()
            return loss

        optimizer.step(objective)
        return added.detach()

    def bounded_share(self, eps: float) -> float:
        """The largest share of the added vectors that a bound on general text allows; see `walk_back`."""
        return walk_back(self._loss_at, self.start, eps)

    def edits(self, eps: float | None = None, share: float = 1.0) -> SenseEdits:
        """The added vectors as edits, or a share of them.

        eps: instead of a share, as far as the loss on general text rises by a share of at most eps.

        Raises ValueError as `walk_back` does.
        """
        if eps is not None:
            share = self.bounded_share(eps)
        made = SenseEdits(self.model, self.tokenizer, "taught by examples")
        for token in dict.fromkeys(token for token, _ in self.pairs):
            rows = [row for row, (t, _) in enumerate(self.pairs) if t == token]
            made.add(token, [self.pairs[row][1] for row in rows], share * self.added[rows].cpu())
        return made

    def _loss_at(self, share: float) -> float:
        with self.edits(share=share).applied():
            return general_loss(self.model, self.background)


@torch.inference_mode()
def mean_weights(model, rows: list[list[int]]) -> torch.Tensor:
    """How much weight each sense of each token has in general text: the mean over all places, (V, k)."""
    total, count = torch.zeros(model.config.vocab_size, model.config.num_senses, device=model.device), 0
    for _, ids, mask in batches(model, rows):
        out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        of_sources = (out.contextualization.float() * mask[:, None, :, None]).sum(2)  # (B, k, T)
        total.index_add_(0, ids.flatten(), of_sources.transpose(1, 2).flatten(0, 1))
        count += int(mask.sum())
    return total.cpu() / count


@torch.inference_mode()
def weights_in(model, tokenizer, prompts: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For each prompt, each token's senses' weights in its last prediction, (V, k) sparse in rows, and o, (n, d)."""
    weights, states = [], []
    for ids, mask, last in prompt_batches(model, tokenizer, prompts):
        out = model.base_model(ids, attention_mask=mask, output_senses=True, use_cache=False)
        rows = torch.arange(len(ids))
        states.append(out.last_hidden_state[rows, last].float())
        for row, of_tokens, end in zip(ids.cpu(), out.contextualization[rows, :, last].float().cpu(), last.tolist()):
            weights.append(_Rows(row[: end + 1], of_tokens[:, : end + 1].T, model.config.num_senses))
    return weights, torch.cat(states)


class _Rows:
    """A (V, k) table of which only the rows of a text's tokens are not zero."""

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor, k: int):
        self.tokens, places = ids.unique(return_inverse=True)
        self.table = torch.zeros(len(self.tokens), k).index_add_(0, places, weights)

    def __getitem__(self, columns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        tokens, senses = columns
        match = tokens[:, None] == self.tokens
        return self.table[match.int().argmax(-1), senses] * match.any(-1)


def choose_pairs(of_examples: list, mean: torch.Tensor, chosen: int, background_weight: float) -> list[tuple[int, int]]:
    """The (token, sense) pairs to change: for each example the `chosen` furthest above their background weight."""
    pairs = {}
    for rows in of_examples:
        score = rows.table - background_weight * mean[rows.tokens]
        for place in score.flatten().topk(min(chosen, score.numel())).indices.tolist():
            row, sense = divmod(place, score.shape[1])
            pairs[int(rows.tokens[row]), sense] = None
    return list(pairs)


# ---------------------------------------------------------------- all weights, or LoRA


def finetune(
    model, tokenizer, examples: Examples, background: list[list[int]], lora: bool = False, learning_rate: float = 1e-4,
    steps: int = 30, kl_weight: float = 1.0, until: float | None = None, seed: int = 0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The change of each weight after finetuning a copy of a model by AdamW. The model stays as it is.

    lora: low-rank updates by peft (rank 8, of attention, MLPs and sense network), instead of all weights. kl_weight: as
    in `SenseTeaching`; each step looks at one batch of the general text. until: stops once all examples' margins reach
    it (nats).
    """
    taught = copy.deepcopy(model)
    before = {name: weight.detach().clone() for name, weight in taught.named_parameters()}
    learner = _with_lora(taught, seed) if lora else taught
    optimizer = torch.optim.AdamW([w for w in learner.parameters() if w.requires_grad], learning_rate, weight_decay=0.0)
    general = [batch for _, *batch in batches(model, background)]
    for step in range(steps):
        log_probs = _last_log_probs(learner, model.device, tokenizer, examples.prompts)
        if until is not None and (examples.margins(log_probs.detach()) >= until).all():
            break
        loss = examples.losses(log_probs).mean() + kl_weight * _divergence(
            model, learner, *general[step % len(general)]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if lora:
        taught = learner.merge_and_unload()
    return {name: weight.detach() - before[name] for name, weight in taught.named_parameters() if name in before}


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


def bounded_share(model, change: dict[str, torch.Tensor], background: list[list[int]], eps: float) -> float:
    """The largest share of a change that a bound on general text allows; see `walk_back`."""

    def loss_at(share: float) -> float:
        with changed(model, change, share):
            return general_loss(model, background)

    return walk_back(loss_at, general_loss(model, background), eps)


def _with_lora(model, seed: int):
    from peft import LoraConfig, get_peft_model  # the extra `lora`
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    conv = [name for name, part in model.named_modules() if isinstance(part, Conv1D)]
    with warnings.catch_warnings():  # peft asks transformers by a name that is going out of use
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=conv, fan_in_fan_out=True))


def _last_log_probs(model, device, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Log-probabilities after each prompt, with gradients, (n, V)."""
    rows = [ids_of_text(tokenizer, prompt) for prompt in prompts]
    ids, mask = pad_rows(rows, tokenizer.eos_token_id, left=True)
    logits = model(ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.float().log_softmax(-1)


def _divergence(model, taught, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL from the model as it was to the one that is taught, in nats per token of a batch of general text."""
    with torch.no_grad():
        before = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float().log_softmax(-1)
    after = taught(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float().log_softmax(-1)
    return F.kl_div(after, before, reduction="batchmean", log_target=True)
