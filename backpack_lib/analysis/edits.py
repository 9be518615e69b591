"""Edits of senses: small patches to the sense table that stack, undo, save, and never touch a weight.

    edits = SenseEdits(model, tokenizer)
    edits.scale("nurse", sense=14, by=0)
    edits.project("macbook", remove="apple", add="hp")
    with edits.applied(model):
        model.generate(...)
    edits.save("mine.safetensors")

Contextualisation weights are read off the trunk, which sees embeddings and not senses. So in a given text
an edit leaves them as they are, and moves each logit by exactly what it changes in the senses' contributions:
one scaled by s moves it by (s - 1) times its contribution.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from backpack_lib.files import as_seen, first_line, written_whole
from backpack_lib.model.hooks import hooked
from backpack_lib.model.kinds import check_sense, require_senses
from backpack_lib.text.words import spell, token_of_word

FORMAT = "backpack sense edits, 1"
PARTS = ("tokens", "senses", "read", "write", "plus")  # the tensors of an edit, where it has them
PROBES = 8  # tokens by whose senses a model is recognised
PROBE_TOLERANCE = 0.05  # relative; lets bf16 and a little fine-tuning pass, another training run does not

Words = str | int | Iterable[str | int] | None
Senses = int | Iterable[int] | None


@dataclass(frozen=True)
class Edit:
    """C(x)_l  <-  by C(x)_l + (C(x)_l . read) write + plus,  for some tokens x and senses l; None stands for all.

    Every kind of edit is of this one form. read, write: (d,); plus: (d,), or one row for each sense, (m, d).
    """

    note: str
    tokens: torch.Tensor | None
    senses: torch.Tensor | None
    by: float = 1.0
    read: torch.Tensor | None = None
    write: torch.Tensor | None = None
    plus: torch.Tensor | None = None

    def __call__(self, token_ids: torch.Tensor, senses: torch.Tensor) -> torch.Tensor:
        """Edited sense vectors of tokens. (n,), (n, k, d) -> (n, k, d)"""
        if self.tokens is None:
            return self._of_all(senses)
        here = torch.isin(token_ids, self.tokens)
        if senses.device.type != "cpu":  # it would have to be waited for, to know how many there are
            return torch.where(here[:, None, None], self._of_all(senses), senses)
        return senses.index_put((here,), self._of_all(senses[here])) if here.any() else senses

    def _of_all(self, senses: torch.Tensor) -> torch.Tensor:
        """The same, as if the edit were for all tokens."""
        old = senses if self.senses is None else senses[:, self.senses]
        new = self.by * old
        if self.read is not None:
            new = new + (old @ self.read.to(old))[..., None] * self.write.to(old)
        if self.plus is not None:
            new = new + self.plus.to(old)
        return new if self.senses is None else senses.index_copy(1, self.senses, new.to(senses))

    def on(self, device: torch.device) -> "Edit":
        """The same edit, its tensors on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


class SenseEdits:
    """A stack of edits to the senses of one model; see the module's example.

    `word` is a word of one token, a token id, several of either, or None for all words; `sense` is an index,
    several, or None for all senses. Each method that edits returns the stack, so calls can be chained.

    Raises ValueError, with nothing added, for words of several tokens, senses out of range, and numbers that are not
    finite.
    """

    def __init__(self, model, tokenizer, description: str = ""):
        require_senses(model)
        self.model, self.tokenizer, self.description = model, tokenizer, description
        self._edits: list[Edit] = []

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits)

    def __repr__(self) -> str:
        lines = [f"{number}. {edit.note}" for number, edit in enumerate(self, start=1)]
        return "\n".join(lines) or "no edits"

    # ------------------------------------------------------------ making edits

    def scale(self, word: Words, sense: Senses = None, by: float = 0.0) -> "SenseEdits":
        """Multiplies senses by a number; 0 silences them."""
        return self._push(lambda named: f"scale {named} by {by:g}", word, sense, by=float(by))

    def replace(self, word: Words, sense: Senses, vector: torch.Tensor | str | int) -> "SenseEdits":
        """Puts a vector, (d,), or the same senses of another word, in the place of senses."""
        if not _is_one(vector):
            return self._push(lambda named: f"replace {named} by a vector", word, sense, by=0.0, plus=_copy(vector))
        token, other = token_of_word(self.tokenizer, vector), self._spell(vector)
        with torch.no_grad():
            senses = self.model.sense_vectors(torch.tensor([token], device=self.model.device))[0]
        senses = senses if sense is None else senses[self._senses(sense)]
        return self._push(lambda named: f"replace {named} by those of {other}", word, sense, by=0.0, plus=_copy(senses))

    def add(self, word: Words, sense: Senses, vector: torch.Tensor) -> "SenseEdits":
        """Adds a vector, (d,), to senses."""
        return self._push(lambda named: f"add a vector to {named}", word, sense, plus=_copy(vector))

    def project(
        self, word: Words, remove: str | int | torch.Tensor, add: str | int | None = None, sense: Senses = None,
        by: float = 0.0,
    ) -> "SenseEdits":  # fmt: skip
        """Takes out of senses what they push `remove`, and, with `add`, lets them push that word as much instead.

        With E_r and E_a the two embeddings and c = C(x)_l . E_r / |E_r|^2, the new sense is
        C(x)_l - c E_r + c E_a |E_r|^2 / |E_a|^2 (Hewitt et al., 2023, on knowledge editing).
        remove: a word, or a direction, (d,), such as the difference of two embeddings. by: what is left of c.
        """
        if _is_one(remove):
            e_r, removed = self._embedding(remove), self._spell(remove)
        else:
            e_r, removed = _copy(remove), "a direction"
            if not e_r.any():
                raise ValueError("The direction to take out is zero; give one that points somewhere.")
        write, then = -e_r, ""
        if add is not None:
            e_a = self._embedding(add)
            write = e_a * (e_r @ e_r / (e_a @ e_a)) - e_r
            then = f" and put {self._spell(add)} in"
        note = f"take {removed} out of" if by == 0 else f"multiply by {by:g} the part of {removed} in"
        return self._push(
            lambda named: f"{note} {named}{then}", word, sense, read=e_r / (e_r @ e_r), write=(1 - by) * write
        )

    def extend(self, edits: Iterable[Edit]) -> "SenseEdits":
        """Adds another stack's edits, which were made for the same model."""
        self._edits.extend(edits)
        return self

    def undo(self) -> "SenseEdits":
        """Takes the last edit back."""
        if not self._edits:
            raise ValueError("There is no edit to undo.")
        self._edits.pop()
        return self

    def clear(self) -> "SenseEdits":
        """Takes all edits back."""
        self._edits.clear()
        return self

    # ------------------------------------------------------------ applying them

    @contextmanager
    def applied(self, model=None):
        """The model with these edits, for as long as the `with` lasts: forward passes, `generate()`, look-ups.

        model: the one they were made for, or another copy of it, on any device; None: the very one.
        Blocks may nest; edits of an inner block come after those of the outer. A text in a cache that was filled
        outside the block is read with these edits, too.
        """
        model = self.model if model is None else model
        if model is not self.model:
            check_fit(model, probe(self.model))
        edits = tuple(edit.on(model.device) for edit in self._edits)  # as they are now

        def patch(token_ids, senses):
            for edit in edits:
                senses = edit(token_ids, senses)
            return senses

        with hooked(model.patches, patch):
            yield model

    # ------------------------------------------------------------ saving and loading

    def save(self, path: str | Path):
        """Writes the edits into one small safetensors file, whole or not at all."""
        path, tensors, edits = Path(path), {"probe": probe(self.model)}, []
        for number, edit in enumerate(self):
            edits.append({"note": edit.note, "by": edit.by})
            for part in PARTS:
                if (value := getattr(edit, part)) is not None:
                    tensors[f"{number}.{part}"] = value.contiguous().cpu()
        name = self.model.config.name_or_path
        metadata = {
            "format": FORMAT,
            "description": self.description,
            "model": Path(name).name if Path(name).is_dir() else name,
            "vocabulary": vocabulary_fingerprint(self.tokenizer),
            "edits": json.dumps(edits),
        }
        with written_whole(path) as building:
            save_file(tensors, building, metadata)

    @classmethod
    def load(cls, path: str | Path, model, tokenizer) -> "SenseEdits":
        """Edits from a file that `save` wrote; one made for another vocabulary or model is refused."""
        metadata, tensors = _read_file(path)
        name = f"{str(path)!r} (for the model {metadata['model']!r})"
        if metadata["vocabulary"] != vocabulary_fingerprint(tokenizer):
            raise ValueError(f"{name} holds edits for another vocabulary; load the model that they were made for.")
        check_fit(model, tensors["probe"], name)
        loaded = cls(model, tokenizer, metadata["description"])
        for number, edit in enumerate(json.loads(metadata["edits"])):
            parts = {part: tensors.get(f"{number}.{part}") for part in PARTS}
            loaded._keep(Edit(**edit, **parts))
        return loaded

    # ------------------------------------------------------------ what was given

    def _push(self, note: Callable[[str], str], word: Words, sense: Senses, **parts) -> "SenseEdits":
        """Adds an edit. note: from the names of its words and senses to a line that says what it does."""
        tokens, senses = _numbers(word, "word", lambda w: token_of_word(self.tokenizer, w)), self._senses(sense)
        return self._keep(Edit(note(self._name(tokens, senses)), tokens, senses, **parts))

    def _keep(self, edit: Edit) -> "SenseEdits":
        """Adds an edit that fits the model, and whose numbers are finite."""
        config = self.model.config
        for ids, size in ((edit.tokens, len(self.tokenizer)), (edit.senses, config.num_senses)):
            if ids is not None and not 0 <= ids.min() <= ids.max() < size:
                raise ValueError(f"An edit names the tokens or senses {ids.tolist()}, but there are only {size}.")
        if not math.isfinite(edit.by):
            raise ValueError(f"by={edit.by} is not a finite number; give one such as 0 or 0.5.")
        rows = config.num_senses if edit.senses is None else len(edit.senses)
        for vector in (edit.read, edit.write, edit.plus):
            if vector is None:
                continue
            if tuple(vector.shape) not in {(config.n_embd,), (rows, config.n_embd)}:
                raise ValueError(f"The vector has shape {tuple(vector.shape)}; this takes ({config.n_embd},).")
            if not vector.isfinite().all():
                raise ValueError("The vector holds numbers that are not finite.")
        self._edits.append(edit)
        return self

    def _senses(self, sense: Senses) -> torch.Tensor | None:
        return _numbers(sense, "sense", lambda s: check_sense(self.model, s))

    @torch.no_grad()
    def _embedding(self, word: str | int) -> torch.Tensor:
        return self.model.get_output_embeddings().weight[token_of_word(self.tokenizer, word)].float()

    def _spell(self, word: str | int) -> str:
        return f"“{spell(self.tokenizer, [token_of_word(self.tokenizer, word)])[0]}”"

    def _name(self, tokens: torch.Tensor | None, senses: torch.Tensor | None) -> str:
        if senses is None:
            named = "all senses"
        else:
            named = f"{'sense' if len(senses) == 1 else 'senses'} {', '.join(map(str, senses.tolist()))}"
        if tokens is None:
            return f"{named} of all words"
        words = [self._spell(token) for token in tokens[:3].tolist()]
        more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
        return f"{named} of {', '.join(words)}{more}"


def _is_one(word) -> bool:
    """Whether something is one word, token or sense, and not several."""
    return isinstance(word, str) or not isinstance(word, Iterable)


def _numbers(one_or_several, kind: str, number_of: Callable[..., int]) -> torch.Tensor | None:
    """The numbers of one or several words or senses; None, for all of them, stays None."""
    if one_or_several is None:
        return None
    given = [one_or_several] if _is_one(one_or_several) else list(one_or_several)
    if not given:
        raise ValueError(f"There is no {kind} to edit in an empty list; give one, or None for all {kind}s.")
    return torch.tensor([number_of(one) for one in given])


def _copy(vector) -> torch.Tensor:
    """Numbers of the edit's own, whatever becomes of those that were given."""
    return torch.as_tensor(vector, dtype=torch.float32).detach().clone()


def vocabulary_fingerprint(tokenizer) -> str:
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


@torch.no_grad()
def probe(model) -> torch.Tensor:
    """The lengths of the unedited senses of a few tokens, by which a model is recognised, (`PROBES`, k)."""
    require_senses(model)
    ids = torch.linspace(0, model.config.vocab_size - 1, PROBES, device=model.device).long()
    return model.sense_vectors(ids, patched=False).float().norm(dim=-1).cpu()


def check_fit(model, expected: torch.Tensor, name: str = "These edits"):
    """Raises ValueError if a model's probe is another than the expected one."""
    lengths = probe(model)
    if lengths.shape != expected.shape or not torch.allclose(lengths, expected, rtol=PROBE_TOLERANCE):
        raise ValueError(
            f"{name}: made for a model whose senses are others than this one's; load the model that they were made for."
        )


def _read_file(path: str | Path) -> tuple[dict, dict]:
    """Metadata and tensors of a file of edits."""
    try:
        with safe_open(as_seen(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{str(path)!r} is missing, damaged, or no safetensors file: {first_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} holds no sense edits (format {metadata.get('format')!r}, not {FORMAT!r}).")
    return metadata, tensors
