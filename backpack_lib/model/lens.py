"""The sense lens: any pretrained Transformer, its predictions split into the senses of words.

Beside a frozen Transformer, the base, whose last state h its output embedding E reads, a sense network gives each
token k vectors C(x), as in a Backpack, and sense weights alpha are read off the base's states. Both are trained so
that o = mean state + sum over j, l of alpha_lij C(x_j)_l comes as near as it can to h. What senses do not say,

    residual_i = h_i - sum over positions j <= i and senses l of alpha_lij C(x_j)_l,

is kept. So without an edit the logits are the base's own, bit for bit, and every logit is a sum of (word, sense)
contributions and one residual; an edit C -> C' moves the logits by exactly E sum alpha (C' - C).

- The base is any model of `AutoModelForCausalLM` whose logits are linear in its last state, which is measured when
  the lens is put on it (`attach`). It is neither trained nor saved with the lens.
- Edits and `weight_hooks` change the last state on its way from the base's body to its output embedding, so that
  `generate()`, caches, labels and whatever else the base does are the base's own.

Shapes are those of `backpack.py`.
"""

from contextlib import contextmanager
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from backpack_lib.model.backpack import (
    SenseNetwork,
    SenseWeightNetwork,
    allowed_positions,
    check_sizes,
    distinct_tokens,
    packed_texts,
)
from backpack_lib.model.cache import CACHE, SenseTable, remember, sense_table
from backpack_lib.model.mixing import at_positions, contextualize, mix_senses, weighted_sum

EMBEDDINGS_KEPT = 100  # rows of the base's input embedding, by which a base is recognised
LEAST_COSINE = 0.95  # their mean; a base that was quantised is the same base still
LINEAR = 1e-3  # relative error up to which logits count as linear in the last state


class SenseLensConfig(PreTrainedConfig):
    """Sizes of a sense lens, and the base that it belongs to.

    base: folder or hub id of the Transformer. n_embd: d, the width of its states and of its input embedding.
    vocab_size: its rows. n_positions: the longest text it reads. middle_layer: whose states the sense weights read
    beside the last. num_senses: k. sense_intermediate_scale: hidden width of the last sense MLP, in multiples of d.
    """

    model_type = "sense_lens"
    attribute_map = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions"}

    base: str = ""
    n_embd: int = 576
    vocab_size: int = 49152
    n_positions: int = 8192
    middle_layer: int = 15
    num_senses: int = 16
    sense_intermediate_scale: int = 3
    activation_function: str = "gelu_pytorch_tanh"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_sizes(self.n_embd, 1, self.num_senses)

    @classmethod
    def of_base(cls, base, name: str = "", **sizes) -> "SenseLensConfig":
        """The configuration of a lens on a base. name: that it is loaded by, if its own configuration does not say."""
        text = base.config.get_text_config()
        vocab_size, n_embd = base.get_output_embeddings().weight.shape
        return cls(
            base=name or base.config.name_or_path,
            n_embd=n_embd,
            vocab_size=vocab_size,
            n_positions=text.max_position_embeddings,
            middle_layer=text.num_hidden_layers // 2,
            **sizes,
        )


class SenseLens(PreTrainedModel, GenerationMixin):
    """A Transformer with the senses of a Backpack; see the module's text."""

    config_class = SenseLensConfig
    main_input_name = "input_ids"
    _no_split_modules = ["SenseNetwork"]

    def __init__(self, config: SenseLensConfig, base=None):
        super().__init__(config)
        self.sense_network = SenseNetwork(config)
        d = config.n_embd
        self.sense_weight_net = SenseWeightNetwork(config, width=2 * d)
        # Means and standard deviations of the base's states, the last and the middle one: without them training diverges.
        self.register_buffer("state_mean", torch.zeros(2 * d))
        self.register_buffer("state_std", torch.ones(2 * d))
        self.register_buffer("constant", torch.zeros(d))  # what o says in every context
        self.register_buffer("embedding_std", torch.ones(()))
        self.register_buffer("embedding_rows", torch.zeros(EMBEDDINGS_KEPT, d))
        self.patches, self.weight_hooks = [], []  # as a Backpack's
        self.base, self.logit_scale = None, 1.0
        self.post_init()
        if base is not None:
            with torch.no_grad():
                self.embedding_rows.copy_(self._rows_of(base))
                self.embedding_std.copy_(base.get_input_embeddings().weight.std())
            self.attach(base)

    # ------------------------------------------------------------ the base

    def attach(self, base) -> "SenseLens":
        """Puts the lens on its base, in evaluation mode and frozen.

        Raises ValueError for another model than the lens was trained on, or logits that are not linear in its state.
        """
        rows, own = self._rows_of(base).to(self.embedding_rows), self.embedding_rows
        cosine = torch.cosine_similarity(rows, own).mean().item() if rows.shape == own.shape else 0.0
        if not cosine >= LEAST_COSINE:
            raise ValueError(
                f"{name_of(base)!r} is another model than this lens was trained on: its embeddings differ "
                f"(mean cosine {cosine:.2f}); load {self.config.base!r}."
            )
        base = base.to(self.device).eval().requires_grad_(False)
        self.__dict__["base"] = base  # not as a submodule, whose weights would be saved and trained with the lens' own
        self.logit_scale, self.generation_config = logit_scale(base), base.generation_config
        return self

    def _rows_of(self, base):
        rows = base.get_input_embeddings().weight
        kept = torch.linspace(0, len(rows) - 1, EMBEDDINGS_KEPT, device=rows.device).long()
        return rows[kept].detach()

    def _apply(self, fn, *args, **kwargs):
        if self.base is not None:
            self.base._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def get_input_embeddings(self):
        return self.base and self.base.get_input_embeddings()

    def get_output_embeddings(self):
        return self.base and self.base.get_output_embeddings()

    @classmethod
    def from_pretrained(cls, name, *args, base=None, **kwargs):
        """A lens from a folder or the hub, on its base. base: that Transformer, where it is at hand."""
        loaded = super().from_pretrained(name, *args, **kwargs)
        lens = loaded[0] if isinstance(loaded, tuple) else loaded
        lens.attach(AutoModelForCausalLM.from_pretrained(lens.config.base, dtype=lens.dtype) if base is None else base)
        return loaded

    # ------------------------------------------------------------ senses and their weights

    def sense_vectors(self, token_ids, patched: bool = True):
        """Sense vectors of each token, without any context. (n,) -> (n, k, d)"""
        embeddings = self.get_input_embeddings()(token_ids).to(self.dtype) / self.embedding_std
        senses = self.sense_network(embeddings) * self.sense_scale()
        return self._patched(token_ids, senses) if patched else senses

    def _patched(self, token_ids, senses):
        for patch in self.patches:
            senses = patch(token_ids, senses)
        return senses

    def sense_scale(self):
        """The deviations of the last state, shared by k senses. (d,)"""
        return self.state_std[: self.config.n_embd] / self.config.num_senses**0.5

    def states(self, input_ids):
        """The base's last and middle states, side by side. (B, T) -> (B, T, 2 d)"""
        out = self.base.get_decoder()(input_ids, output_hidden_states=True, use_cache=False)
        return torch.cat([out.last_hidden_state, out.hidden_states[self.config.middle_layer]], -1)

    def queries_and_keys(self, states):
        """(B, T, 2 d) -> queries and keys, each (B, k, T, d_s)"""
        return self.sense_weight_net((states.to(self.dtype) - self.state_mean) / self.state_std)

    def explain(self, input_ids, states, distinct=None):
        """o, what senses alone make of the last state. (B, T), (B, T, 2 d) -> (B, T, d)

        distinct: what `distinct_tokens(input_ids)` returned, if it has been asked.
        """
        tokens, inverse = distinct or distinct_tokens(input_ids)
        queries, keys = self.queries_and_keys(states)
        n = input_ids.shape[1]
        allowed = allowed_positions(None, n, n, 0, input_ids.device)
        return self.constant + mix_senses(queries, keys, self.sense_vectors(tokens), inverse, allowed)

    def logits_of(self, states):
        """The base's logits of last states, (..., d) -> (..., V)"""
        return self.get_output_embeddings()(states) * self.logit_scale

    # ------------------------------------------------------------ the base with edits

    def forward(self, input_ids=None, attention_mask=None, output_senses=False, **kwargs):
        """The base's own forward pass, under the active edits; it takes and returns what the base does.

        output_senses: also return what a Backpack does, and `residual`, (B, T, d): what no sense says of each
            position's last state.
        """
        with self._watched(output_senses) as seen:
            outputs = self.base(input_ids, attention_mask=attention_mask, **kwargs)
        for name, tensor in seen.items():
            outputs[name] = tensor
        return outputs

    def generate(self, *args, **kwargs):
        """The base's `generate()`, under the active edits."""
        with self._watched():
            return self.base.generate(*args, **kwargs)

    @contextmanager
    def _watched(self, output_senses=False):
        """While it lasts, edits change the last state of the base's body. Yields what `output_senses` asks for."""
        seen = {}
        if not (self.patches or self.weight_hooks or output_senses):
            yield seen
            return

        def before(body, args, kwargs):
            return args, kwargs | {"output_hidden_states": True, "return_dict": True}

        def after(body, args, kwargs, outputs):
            named = {"input_ids": args[0]} | kwargs if args else kwargs
            if named.get("input_ids") is None:
                raise ValueError("Edits of senses need token ids; give `input_ids` instead of `inputs_embeds`.")
            outputs.last_hidden_state = self._edited(named, outputs, output_senses, seen)
            return outputs

        body = self.base.get_decoder()
        with (
            body.register_forward_pre_hook(before, with_kwargs=True),
            body.register_forward_hook(after, with_kwargs=True),
        ):
            yield seen

    def _edited(self, inputs, outputs, output_senses, seen):
        """The last state of the base's body, less what senses say without edits, plus what they say with them."""
        h, cache = outputs.last_hidden_state, outputs.get(CACHE)
        input_ids, attention_mask = inputs["input_ids"], inputs.get("attention_mask")
        texts = packed_texts(inputs.get("position_ids"), attention_mask, cache, len(input_ids))
        queries, keys = self.queries_and_keys(torch.cat([h, outputs.hidden_states[self.config.middle_layer]], -1))
        if cache is None:
            ids, table = input_ids, SenseTable(self.config.vocab_size, input_ids.device)
        else:
            keys, ids, table = self._remember(cache, keys, input_ids)
        old, inverse = table.look_up(ids, partial(self.sense_vectors, patched=False))
        tokens = ids.new_zeros(len(old)).scatter_(0, inverse.flatten(), ids.flatten())
        new = self._patched(tokens, old)
        n_new, n_all = input_ids.shape[1], keys.shape[2]
        allowed = allowed_positions(attention_mask, n_new, n_all, n_all - n_new, ids.device, texts)
        if not (output_senses or self.weight_hooks):
            return h + mix_senses(queries, keys, new - old, inverse, allowed).to(h)
        alpha, senses = contextualize(queries, keys, allowed), at_positions(new, inverse)
        said = weighted_sum(alpha, at_positions(old, inverse))
        for hook in self.weight_hooks:
            alpha = hook(alpha, senses, input_ids, attention_mask)
        if output_senses:
            seen.update(contextualization=alpha, senses=senses, residual=h - said.to(h))
        if self.patches or self.weight_hooks:
            h = h + (weighted_sum(alpha, senses) - said).to(h)
        return h

    def _remember(self, cache, keys, input_ids):
        """Adds new positions to the base's cache; of all so far: keys, token ids, and the table of unedited senses."""
        n_layer = self.base.config.get_text_config().num_hidden_layers
        table = sense_table(cache, n_layer, self.config.vocab_size, keys.device)
        keys, ids = remember(cache, n_layer, keys, input_ids)
        if keys.shape[2] != cache.get_seq_length():
            raise ValueError("This cache was filled while no edit was active; read the text anew under the edit.")
        return keys, ids, table


def name_of(base) -> str:
    return base.config.name_or_path or type(base).__name__


@torch.no_grad()
def logit_scale(base) -> float:
    """The factor s in logits = s head(state), where head is a base's output embedding."""
    head = base.get_output_embeddings()
    state = torch.randn(1, 1, head.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(head.weight)
    state *= 100 / head(state).float().std()  # far beyond the size of any logit, where a soft cap would bend it

    def give(body, args, outputs):
        outputs.last_hidden_state = state
        return outputs

    with base.get_decoder().register_forward_hook(give):
        logits = base(torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False, return_dict=True).logits
    logits, plain = logits.double().flatten(), head(state).double().flatten()
    scale = (logits @ plain / (plain @ plain)).item()
    if not (logits - scale * plain).norm() <= LINEAR * logits.norm():
        raise ValueError(
            f"The logits of {name_of(base)!r} are not linear in its last state (it has a soft cap, say), "
            "so they are no sum of contributions; choose another base for the lens."
        )
    return 1.0 if abs(scale - 1) < LINEAR else scale


AutoConfig.register(SenseLensConfig.model_type, SenseLensConfig)
AutoModelForCausalLM.register(SenseLensConfig, SenseLens)
