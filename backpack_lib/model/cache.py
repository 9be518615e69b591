"""The part of transformers' cache in which a text's senses are kept while more is written.

Shapes: batch B, tokens so far S, width d, senses k.
"""

from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# What arguments and outputs of transformers' models call a cache: it was renamed in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ROOM = 128  # tokens that a cache makes room for at once


class SenseLayer(DynamicLayer):
    """The sense layer's part of a cache: the keys and senses of a text so far, with room for more.

    Senses are wide, so to copy all of them for each new token, as `DynamicLayer` does, or to compute those of a
    token that was there before, would take as long as a small trunk.

    known: the senses of tokens that were there, (k, d), by token; patches: those under which they were computed.
    """

    def __init__(self):
        super().__init__()
        self.rooms, self.known, self.patches = {}, {}, []

    def update(self, key_states, value_states, *args, **kwargs):
        if key_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def known_under(self, patches: list) -> dict:
        """The senses of tokens that were there, which other patches make void."""
        if self.patches != patches:
            self.known, self.patches = {}, list(patches)
        return self.known

    def _append(self, name, old, new):
        """Old rows and new ones after them, (B, k, S, width), written into the room if they still lie there."""
        if not old.numel():
            return new  # perhaps nothing will follow, so no room is made yet
        n_old = old.shape[-2]
        n_all = n_old + new.shape[-2]
        room = self.rooms.get(name)
        if room is None or n_all > room.shape[-2] or len(old) != len(room) or old.data_ptr() != room.data_ptr():
            room = self.rooms[name] = new.new_empty(*new.shape[:-2], n_all + ROOM, new.shape[-1])
            room[..., :n_old, :] = old
        room[..., n_old:n_all, :] = new
        return room[..., :n_all, :]


def make_room_for_senses(cache: Cache, n_layer: int):
    """Adds the sense layer to a cache that has the trunk's layers only; other kinds grow by themselves."""
    if len(cache.layers) == n_layer:
        trunk = cache.layers[0]
        if isinstance(trunk, StaticLayer):
            cache.layers.append(StaticLayer(trunk.max_cache_len))
        elif type(trunk) is DynamicLayer:
            cache.layers.append(SenseLayer())
