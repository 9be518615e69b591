"""What is special in training a sense lens: its base's states, where it starts, and its loss.

The base is frozen, so its states of a block never change: they are computed once and kept on disk. The lens starts
from a regression: a token's senses, summed, should be the base's state when it reads that token alone. Then it is
taught the base's own predictions.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from backpack_lib.files import written_whole
from backpack_lib.model.lens import SenseLens

SAMPLE_BLOCKS = 128  # of which means and deviations are taken
COUNTED_BLOCKS = 10_000  # of which tokens are counted
START_TOKENS, START_STEPS, START_BATCH, START_RATE = 20_000, 250, 512, 2e-3
FREQUENT, RARE = 6_000, 2_000  # tokens whose probabilities are taught at a step: the most frequent, others by lot


class KeptStates:
    """The base's states of blocks, computed once: a file a block, in half precision; beyond `most_bytes`, at each need."""

    def __init__(self, lens: SenseLens, folder: Path, most_bytes: float):
        self.lens, self.folder, self.most_bytes = lens, folder, most_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.bytes = sum(file.stat().st_size for file in folder.glob("*.npy"))

    @torch.no_grad()
    def __call__(self, input_ids):
        """(B, T) -> (B, T, 2 d), as they are read from the files, so that a resumed run sees the same numbers."""
        digests = [hashlib.blake2b(row.numpy().tobytes(), digest_size=12) for row in input_ids.cpu()]
        files = [self.folder / f"{digest.hexdigest()}.npy" for digest in digests]
        # If one is missing, all are computed again, since rounding depends on what a product computes beside.
        if all(file.is_file() for file in files):
            return torch.from_numpy(np.stack([np.load(file) for file in files])).to(input_ids.device).float()
        largest = torch.finfo(torch.float16).max
        states = self.lens.states(input_ids).clamp(-largest, largest).half()
        for file, row in zip(files, states.cpu().numpy()):
            if self.bytes + row.nbytes <= self.most_bytes and not file.is_file():
                with written_whole(file) as building, open(building, "wb") as target:
                    np.save(target, row)
                self.bytes += row.nbytes
        return states.float()


class LensLoss(nn.Module):
    """The loss of a lens on some sequences: (B, T) -> scalar.

    In training: KL from the base's prediction to that of the senses alone, in nats, over the most frequent tokens and
    others drawn by lot, and the share of the variance of the logits that senses leave unexplained, over all tokens.
    In evaluation: mean nats per token of the text under the senses alone.

    counts: how often each token stands in the text, (V,). distinct: as in `LanguageModelLoss`.
    """

    def __init__(self, lens: SenseLens, states: KeptStates, counts: torch.Tensor):
        super().__init__()
        self.model = lens
        self.states = states
        self._no_split_modules = lens._no_split_modules  # FSDP asks for them
        E = lens.get_output_embeddings().weight.detach().float()
        E = E - E.mean(0)  # logits less their mean over the vocabulary
        self.register_buffer("gram", E.T @ E / len(E), persistent=False)
        self.register_buffer("counts", counts.to(E.device), persistent=False)

    def forward(self, input_ids, *distinct):
        states = self.states(input_ids)
        h, o = states[..., : self.model.config.n_embd], self.model.explain(input_ids, states, distinct)
        if self.training:
            return self.distance(h.flatten(0, 1), o.flatten(0, 1))
        logits = self.model.logits_of(o[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten())

    def distance(self, h, o):
        """How far what the senses say, o, is from the base's states, h. (n, d), (n, d) -> scalar"""
        head, by_frequency = self.model.get_output_embeddings(), self.counts.argsort(descending=True)
        rare = torch.randperm(max(0, len(by_frequency) - FREQUENT))[:RARE].to(h.device) + FREQUENT
        taught = torch.cat([by_frequency[:FREQUENT], by_frequency[rare]])
        rows, bias = head.weight[taught], None if head.bias is None else head.bias[taught]
        with torch.no_grad():
            p = (F.linear(h, rows, bias) * self.model.logit_scale).float().log_softmax(-1)
        q = (F.linear(o, rows, bias) * self.model.logit_scale).float().log_softmax(-1)
        kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
        return kl + self.energy(h - o) / self.energy(h - h.mean(0))

    def energy(self, states):
        """Mean of the squared logits of states, less their mean over the vocabulary. (n, d) -> scalar"""
        return ((states @ self.gram) * states).sum(-1).mean()

    @torch.no_grad()
    def centre(self):
        """Moves each sense's mean over the text into the constant, so that a word's senses say how it differs.

        It leaves o as it is, since the weights of a sense sum to one.
        """
        lens, share = self.model, self.counts / self.counts.sum()
        mean = torch.zeros(lens.config.num_senses, lens.config.n_embd, device=share.device)
        for tokens in self.counts.nonzero()[:, 0].split(1024):
            mean += torch.einsum("n,nkd->kd", share[tokens], lens.sense_vectors(tokens, patched=False))
        lens.sense_network.final_mlp.c_proj.bias -= (mean / lens.sense_scale()).flatten()
        lens.constant += mean.sum(0)


def start(lens: SenseLens, states: KeptStates, blocks, counts: torch.Tensor):
    """Gives a new lens the means of its base's states, and senses that sum to the state of their token alone."""
    d = lens.config.n_embd
    sample = blocks.train[:SAMPLE_BLOCKS]["input_ids"].to(lens.device)
    of_sample = torch.cat([states(batch) for batch in sample.split(8)]).flatten(0, 1)
    lens.state_mean.copy_(of_sample.mean(0))
    lens.state_std.copy_(of_sample.std(0))
    lens.constant.copy_(of_sample[:, :d].mean(0))

    tokens = counts.argsort(descending=True)[: min(START_TOKENS, int((counts > 0).sum()))].to(lens.device)
    # Alone is after the token that every text begins with.
    pairs = torch.stack([torch.full_like(tokens, blocks.tokenizer.eos_token_id), tokens], 1)
    with torch.no_grad():
        alone = torch.cat([lens.states(part)[:, 1, :d] for part in tqdm(pairs.split(256), "tokens alone", leave=False)])
    scale, target = lens.state_std[:d], alone - lens.constant
    optimizer = torch.optim.AdamW(lens.sense_network.parameters(), lr=START_RATE, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, START_STEPS)
    for _ in tqdm(range(START_STEPS), "regression", leave=False):
        chosen = torch.randint(len(tokens), (START_BATCH,), device=tokens.device)
        senses = lens.sense_vectors(tokens[chosen])
        # The second term keeps senses small, so that they sum to the state instead of cancelling each other.
        loss = ((senses.sum(1) - target[chosen]) / scale).square().mean() + 0.02 * (senses / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
