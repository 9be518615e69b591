"""The Backpack language model (Hewitt et al., ACL 2023) on transformers' own base classes.

What is notable:

- The trunk is transformers' `GPT2Model`; this file adds only what makes a Backpack.
- `SenseNetwork` turns a token's embedding into k sense vectors, whatever the context.
- `SenseWeightNetwork` reads the trunk's hidden states and says how much of each sense of
  each earlier token goes into each prediction (the contextualisation weights, alpha).
- A prediction is their weighted sum, so every logit is linear in the sense vectors.
- Senses are computed for distinct tokens only, as the rows of a table; `mixing.py` sums them.
- `patches` may change senses as they are computed, and `weight_hooks` the weights, which is how `SenseEdits` and
  topic control work.
- While a text is written, the sense layer is one more layer of transformers' cache (`cache.py`).
- Parameter names are those of the released checkpoint (stanfordnlp/backpack-gpt2), which therefore loads without
  remote code.

Shapes: batch B, new tokens T, all tokens so far S (= T without a cache), width d, senses k, distinct tokens n,
vocabulary V, and d_s = floor(d / k), the width of a sense's queries and keys.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2Model,
    GPT2PreTrainedModel,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from backpack_lib.model.cache import CACHE, remember, sense_layer, sense_table
from backpack_lib.model.kinds import suppress_unused_rows
from backpack_lib.model.mixing import at_positions, contextualize, mix_senses, weighted_sum
from backpack_lib.model.output import IGNORED, OutputEmbedding

# The released model pads GPT-2's 50257 tokens to a multiple of 8; its config does not say so.
GPT2_TOKENS, GPT2_TOKENS_PADDED = 50257, 50264


class BackpackConfig(GPT2Config):
    """GPT-2's configuration and what a Backpack adds to it.

    num_senses: k, sense vectors per token; it need not divide `n_embd`.
    sense_intermediate_scale: hidden width of the last sense MLP, in multiples of `n_embd`.
    used_vocab_size: how many rows of the vocabulary stand for a token. The rows above are
        padding and are never generated. None: all of them are used.
    """

    model_type = "backpack"

    num_senses: int = 16
    sense_intermediate_scale: int = 4
    used_vocab_size: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_sizes(self.n_embd, self.n_head, self.num_senses)
        if self.activation_function == "gelu_new":
            self.activation_function = "gelu_pytorch_tanh"  # the same function, in one kernel instead of eight

    def to_dict(self):
        # By default, peft adapts the layers that it adapts in a GPT-2. It looks a model's type up in tables of its own,
        # after it asked for the configuration as a dictionary.
        for table in vars(sys.modules.get("peft.utils.constants", sys)).values():
            if isinstance(table, dict) and "gpt2" in table:
                table.setdefault(self.model_type, table["gpt2"])
        return super().to_dict()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_released_format(config), kwargs


def check_sizes(n_embd: int, n_head: int, num_senses: int = 1):
    """Raises ValueError if the width cannot be divided into the heads or holds too few numbers for the senses."""
    if n_head < 1 or n_embd % n_head:
        raise ValueError(
            f"n_embd={n_embd} does not divide into n_head={n_head} heads; "
            "choose an n_embd that is a multiple of n_head."
        )
    if not 1 <= num_senses <= n_embd:
        raise ValueError(f"num_senses={num_senses} is out of range; choose between 1 and n_embd={n_embd}.")


def from_released_format(config: dict) -> dict:
    """A released checkpoint's configuration under our model type; any other configuration unchanged.

    The released one calls itself "gpt2" and points to remote code, which we do without.
    """
    if config.get("model_type") != "gpt2" or "num_senses" not in config:
        return config
    config = {key: value for key, value in config.items() if key not in ("auto_map", "architectures")}
    if config.get("vocab_size") == GPT2_TOKENS_PADDED:
        config["used_vocab_size"] = GPT2_TOKENS
    return config | {"model_type": BackpackConfig.model_type}


class SenseMLP(nn.Module):
    """One hidden layer from a token's features to its k sense vectors. (n, d) -> (n, k, d)"""

    def __init__(self, config: BackpackConfig):
        super().__init__()
        hidden = config.sense_intermediate_scale * config.n_embd
        self.c_fc = Conv1D(hidden, config.n_embd)
        self.c_proj = Conv1D(config.num_senses * config.n_embd, hidden)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.num_senses = config.num_senses

    def forward(self, features):
        senses = self.dropout(self.c_proj(self.act(self.c_fc(features))))
        return senses.unflatten(-1, (self.num_senses, -1))


class SenseBlock(nn.Module):
    """A Transformer block without its attention: the released model's, residual before each norm."""

    def __init__(self, config: BackpackConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(4 * config.n_embd, config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, features, residual):
        residual = self.dropout(features) + residual
        features = self.ln_1(residual)
        residual = self.mlp(features) + residual
        return self.ln_2(residual)


class SenseNetwork(nn.Module):
    """Sense vectors of tokens from their embeddings alone. (n, d) -> (n, k, d)"""

    def __init__(self, config: BackpackConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.ln = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.block = SenseBlock(config)
        self.final_mlp = SenseMLP(config)

    def forward(self, embeddings):
        embeddings = self.dropout(embeddings)
        return self.final_mlp(self.block(self.ln(embeddings), residual=embeddings))


class SenseWeightNetwork(nn.Module):
    """One query and one key per sense and position, read off hidden states. width: of these, if it is not d."""

    def __init__(self, config: BackpackConfig, width: int | None = None):
        super().__init__()
        self.num_senses = config.num_senses
        self.width = config.n_embd // config.num_senses
        self.c_attn = nn.Linear(width or config.n_embd, 2 * self.num_senses * self.width)

    def forward(self, hidden_states):
        """(B, T, d) -> queries and keys, each (B, k, T, d_s)"""
        both = self.c_attn(hidden_states).unflatten(-1, (2, self.num_senses, self.width))
        queries, keys = both.permute(2, 0, 3, 1, 4)
        return queries, keys


def allowed_positions(attention_mask, n_new, n_total, n_past, device, texts=None):
    """Which earlier positions each new one may look at. -> bool, broadcastable to (B, 1, T, S)

    attention_mask: None, (B, S) with zeros on padding, or transformers' ready (B, 1, T, S).
    texts: (B, T), the number of the text that each position belongs to, where several stand in a row.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
    new = torch.arange(n_new, device=device) + n_past
    allowed = torch.arange(n_total, device=device) <= new[:, None]
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, -n_total:].bool()[:, None, None, :]
    if texts is not None:
        allowed = allowed & (texts[:, None, :, None] == texts[:, None, None, :])
    return allowed


def packed_texts(position_ids, attention_mask, cache, batch):
    """The number of the text that each position belongs to, (B, T), where positions say that several stand in a row."""
    if position_ids is not None and attention_mask is None and cache is None:
        return find_packed_sequence_indices(position_ids.expand(batch, -1))


def check_ids(input_ids: torch.Tensor, vocab_size: int):
    """Raises ValueError for an id that is no row of the vocabulary."""
    if not 0 <= input_ids.min() <= input_ids.max() < vocab_size:
        raise ValueError(
            f"Token ids run from {input_ids.min()} to {input_ids.max()}, but the vocabulary has "
            f"{vocab_size} rows; use the tokenizer that belongs to this model."
        )


@torch.compiler.disable  # their number is known only once they are found
def distinct_tokens(input_ids, padded=False):
    """The distinct tokens of a batch, and which of them stands where. (B, T) -> (n,), (B, T)

    padded: repeat the last one until n is a multiple of an eighth of the batch, so that compiled code meets few sizes.
    """
    distinct, inverse = input_ids.unique(return_inverse=True)
    if padded:
        step = max(1, input_ids.numel() // 8)
        distinct = torch.cat([distinct, distinct[-1:].expand(-len(distinct) % step)])
    return distinct, inverse


def each_token(input_ids):
    """All tokens of a batch as they are, in the format of `distinct_tokens`."""
    tokens = input_ids.flatten()
    return tokens, torch.arange(len(tokens), device=tokens.device).view_as(input_ids)


@dataclass
class BackpackLMOutput(CausalLMOutputWithCrossAttentions):
    """loss: mean cross-entropy in nats, when labels are given.
    logits: (B, T, V).
    contextualization: alpha, (B, k, T, S), and senses: (B, k, S, d), with `output_senses=True`;
        logits = sum over positions j and senses l of alpha[:, l, :, j] * (senses[:, l, j] . E).
    hidden_states, attentions: the trunk's, on request.
    """

    contextualization: torch.Tensor | None = None
    senses: torch.Tensor | None = None


class BackpackPreTrainedModel(GPT2PreTrainedModel):
    config_class = BackpackConfig
    base_model_prefix = "backpack"
    _no_split_modules = ["GPT2Block", "SenseNetwork"]
    # Aliases and buffers that checkpoints of the released model's age carry.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$", r"(^|\.)(word|position)_embeddings\.weight$"]


class BackpackModel(BackpackPreTrainedModel):
    """The trunk, the sense vectors and their weighted sum; everything but the output embedding."""

    def __init__(self, config: BackpackConfig):
        super().__init__(config)
        self.gpt2_model = GPT2Model(config)
        self.sense_network = SenseNetwork(config)
        self.sense_weight_net = SenseWeightNetwork(config)
        # Functions of (token_ids, senses) -> senses, called in order; see `edits.py`. No part of the weights.
        self.patches = []
        # Functions of (alpha, senses, input_ids, attention_mask) -> alpha, called in order; see `topic.py`.
        self.weight_hooks = []
        self.post_init()

    def _init_weights(self, module):
        """Starts the sense network by fan-in (the trunk starts itself).

        Nothing stands between the sum of senses and the logits. From GPT-2's small start the first gradients would
        be tiny, and high learning rates would fail.
        """
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            initialization.normal_(module.weight, std=module.nx**-0.5)

    def get_input_embeddings(self):
        return self.gpt2_model.wte

    def set_input_embeddings(self, embeddings):
        self.gpt2_model.wte = embeddings

    def embed(self, token_ids):
        """Rows of the input embedding. (n,) -> (n, d)"""
        return self.gpt2_model.wte(token_ids[None])[0]  # as a batch, which hooks on embeddings (NEFTune's) expect

    def sense_vectors(self, token_ids, embeddings=None, patched=True):
        """Sense vectors of each token, without any context. (n,) -> (n, k, d)

        embeddings: the tokens' rows of the input embedding, (n, d), if they are at hand; or, with token_ids=None,
            any others, to which no patches apply. patched: under the active edits.
        """
        senses = self.sense_network(self.embed(token_ids) if embeddings is None else embeddings)
        for patch in self.patches if patched and token_ids is not None else ():
            senses = patch(token_ids, senses)
        return senses

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_senses=False,
        distinct=None,
        **kwargs,
    ):
        """The trunk's output with the weighted sum of senses as last state, (B, T, d); see `BackpackLMHeadModel.forward`.

        distinct: what `distinct_tokens(input_ids)` returned, if it has been asked.
        """
        past = 0 if cache is None else cache.get_seq_length()
        self._check_input(input_ids, inputs_embeds, past)
        batch, n_new = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        texts = packed_texts(position_ids, attention_mask, cache, batch)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Padding takes no position, so a left-padded text is read as if it stood alone.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -n_new:]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and texts is None
        if use_cache and cache is None and not (self.training and self.gpt2_model.gradient_checkpointing):
            cache = DynamicCache()

        if inputs_embeds is not None:
            tokens, embeddings = None, inputs_embeds.flatten(0, 1)
            inverse = torch.arange(batch * n_new, device=embeddings.device).view(batch, n_new)
        else:
            # Senses do not depend on the place. With a cache, its table knows of which tokens they are to be computed.
            tokens, inverse = each_token(input_ids) if cache is not None else distinct or distinct_tokens(input_ids)
            embeddings = self.embed(tokens)
        outputs = self.gpt2_model(
            inputs_embeds=F.embedding(inverse, embeddings),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        queries, keys = self.sense_weight_net(outputs.last_hidden_state)
        n_total, n_past = n_new, 0
        if cache is None:
            table = self.sense_vectors(tokens, embeddings)
        else:
            layer = sense_layer(cache, self.config.n_layer)
            n_total, n_past = layer.get_mask_sizes(n_new)[0], layer.get_seq_length() + 0  # a tensor would grow in place
            keys, table, inverse = self._remember(cache, keys, input_ids, embeddings)
        table, inverse = table.to(keys.device), inverse.to(keys.device)  # if layers are spread over devices
        allowed = allowed_positions(attention_mask, n_new, n_total, n_past, keys.device, texts)

        if not (output_senses or self.weight_hooks):
            outputs.last_hidden_state = mix_senses(queries, keys, table, inverse, allowed)
            return outputs
        alpha, senses = contextualize(queries, keys, allowed), at_positions(table, inverse)
        for hook in self.weight_hooks:
            alpha = hook(alpha, senses, input_ids, attention_mask)
        outputs.last_hidden_state = weighted_sum(alpha, senses)
        if output_senses:
            outputs["contextualization"], outputs["senses"] = alpha, senses
        return outputs

    def _remember(self, cache, keys, input_ids, embeddings):
        """Adds new positions to a cache; of all so far: keys (B, k, S, d_s), table (n, k, d) and inverse (B, S)."""
        if torch.compiler.is_compiling():  # no graph can have a table that grows by need
            keys, ids = remember(cache, self.config.n_layer, keys, input_ids)
            tokens, inverse = each_token(ids)
            return keys, self.sense_vectors(tokens), inverse
        known = sense_table(cache, self.config.n_layer, self.config.vocab_size, keys.device)
        if input_ids is None:
            input_ids = known.append_embeddings(self.sense_network(embeddings)).view(len(keys), -1)
        keys, ids = remember(cache, self.config.n_layer, keys, input_ids)
        return keys, *known.look_up(ids, self.sense_vectors, self.patches)

    def _check_input(self, input_ids, inputs_embeds, n_past):
        if torch.compiler.is_compiling():
            return
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        new = input_ids if inputs_embeds is None else inputs_embeds
        length, limit = int(n_past) + new.shape[1], self.config.n_positions
        if length > limit:
            raise ValueError(
                f"The text has {length} tokens, but this model reads at most n_positions={limit}; "
                "shorten the text or generate fewer tokens."
            )
        # Elsewhere this would make the device wait, and the error is rare.
        if input_ids is not None and input_ids.device.type == "cpu":
            check_ids(input_ids, self.config.vocab_size)


class BackpackLMHeadModel(BackpackPreTrainedModel, GenerationMixin):
    """A Backpack that predicts the next token: logits = E o, with E tied to the input embedding."""

    _tied_weights_keys = {"lm_head.weight": "backpack.gpt2_model.wte.weight"}

    def __init__(self, config: BackpackConfig):
        super().__init__(config)
        self.backpack = BackpackModel(config)
        self.lm_head = OutputEmbedding(config.n_embd, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()
        suppress_unused_rows(self)

    @property
    def patches(self) -> list:
        return self.backpack.patches

    @property
    def weight_hooks(self) -> list:
        return self.backpack.weight_hooks

    def sense_vectors(self, token_ids, patched=True):
        """Sense vectors of each token, without any context. (n,) -> (n, k, d). patched: under the active edits."""
        return self.backpack.sense_vectors(token_ids, patched=patched)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_senses=False,
        logits_to_keep=0,
        **kwargs,
    ) -> BackpackLMOutput:
        """Predict the token after each position. (B, T) -> `BackpackLMOutput`

        attention_mask: (B, S), 0 on padding; padding may stand on either side.
        position_ids: (B, T). Several texts in a row, without attention_mask and cache, are told apart by positions
            that begin again.
        cache: a transformers cache; `input_ids` then holds only the new tokens.
        inputs_embeds: (B, T, d), instead of `input_ids`; their senses are the sense network's, without edits.
        labels: (B, T), usually `input_ids` itself (the shift happens inside); -100 is ignored.
        output_senses: also return the contextualisation weights and the sense vectors.
        logits_to_keep: the last so many positions only; 0 keeps all.
        """
        outputs = self.backpack(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_senses=output_senses,
            **kwargs,
        )
        outputs = dict(outputs)
        loss, hidden = None, outputs.pop("last_hidden_state")
        if labels is not None and self._has_own_loss and logits_to_keep == 0:
            following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            loss, logits = self.lm_head(hidden, kwargs.get("shift_labels", following), kwargs.get("num_items_in_batch"))
        else:
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, positions])
            if labels is not None:
                loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return BackpackLMOutput(loss=loss, logits=logits, **outputs)

    @property
    def _has_own_loss(self) -> bool:
        """Whether neither the output embedding nor the loss function was replaced, as by adapters or resizing."""
        return isinstance(self.lm_head, OutputEmbedding) and not hasattr(self, "_loss_function")


AutoConfig.register(BackpackConfig.model_type, BackpackConfig)
AutoModel.register(BackpackConfig, BackpackModel)
AutoModelForCausalLM.register(BackpackConfig, BackpackLMHeadModel)
