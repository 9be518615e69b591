"""What people use where a prediction cannot be split exactly: attention weights, and gradient times input.

Each gives a number for every token of a text. The planted corpus shows what they get wrong: whether a text goes on with
"he" or "she" depends on one word alone, the profession or the name.
"""

import pandas as pd
import torch

from backpack_lib.analysis.attribution import read
from backpack_lib.model.kinds import require_transformer
from backpack_lib.text import planted
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text


def contributions_of_tokens(model, ids: list[int], a: int, b: int) -> torch.Tensor:
    """The exact contribution of each token to the log-odds of a to b, summed over its senses, (T,)."""
    return read(model, ids).contributions(a, b).sum(1)[: len(ids)]


def weights_of_tokens(model, ids: list[int]) -> torch.Tensor:
    """A Backpack's weights alone, the mean over senses, (T,)."""
    return read(model, ids).weights.mean(1)


@torch.no_grad()
def attention_of_tokens(transformer, ids: list[int]) -> torch.Tensor:
    """A Transformer's attention from the last token, the mean over layers and heads, (T,)."""
    require_transformer(transformer)
    used = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")  # the others do not return it
    try:
        rows = torch.tensor([ids], device=transformer.device)
        attentions = transformer(
            rows, attention_mask=torch.ones_like(rows), output_attentions=True, use_cache=False
        ).attentions
    finally:
        transformer.set_attn_implementation(used)
    return torch.stack(attentions)[:, 0, :, -1].mean((0, 1))


def gradient_times_input(transformer, ids: list[int], a: int, b: int) -> torch.Tensor:
    """The log-odds' gradient at each token's embedding times that embedding, (T,)."""
    require_transformer(transformer)
    rows = torch.tensor([ids], device=transformer.device)
    inputs = transformer.get_input_embeddings()(rows).detach().requires_grad_()
    logits = transformer(inputs_embeds=inputs, attention_mask=torch.ones_like(rows), use_cache=False).logits[0, -1]
    (gradient,) = torch.autograd.grad(logits[a] - logits[b], inputs)
    return (gradient * inputs).sum(-1)[0].detach()


def planted_pronoun_texts(n: int = 100, seed: int = 1) -> list[tuple[str, str]]:
    """Planted texts up to the pronoun, and the person that it depends on."""
    made = []
    for text in planted.generate(n, seed):
        before = text.text.split(f" {text.pronoun} ")[0]
        made.append((before, text.person))
    return made


def token_scores(backpack, transformer, tokenizer, text: str, pair=("he", "she")) -> dict[str, torch.Tensor]:
    """Every method's number for each token of a text: name -> (T,)."""
    ids, (a, b) = ids_of_text(tokenizer, text), (token_of_word(tokenizer, word) for word in pair)
    return {
        "contributions (exact)": contributions_of_tokens(backpack, ids, a, b),
        "weights alone": weights_of_tokens(backpack, ids),
        "Transformer: attention": attention_of_tokens(transformer, ids),
        "Transformer: gradient × input": gradient_times_input(transformer, ids, a, b),
    }


def compare_on_planted(backpack, transformer, tokenizer, n: int = 100, seed: int = 1) -> pd.DataFrame:
    """How well each method finds the one word on which a planted text's pronoun depends.

    A row a text and method: found, whether that word has the largest number by size; share, that word's share of all
    numbers by size; and chance, one over the number of tokens.
    """
    rows = []
    for number, (text, person) in enumerate(planted_pronoun_texts(n, seed)):
        ids = ids_of_text(tokenizer, text)
        place = ids.index(token_of_word(tokenizer, person))
        for method, scores in token_scores(backpack, transformer, tokenizer, text).items():
            size = scores.abs().float().cpu().numpy()
            rows.append((number, method, int(size.argmax() == place), size[place] / size.sum(), 1 / len(ids)))
    return pd.DataFrame(rows, columns=["text", "method", "found", "share", "chance"])
