"""A GPU that is not there: tensors that say they are on "cuda", and are held by the CPU.

    with Card() as card:
        model = card.move(model)                     # and card.move(tensor)
        model(card.move(input_ids))                  # raises where a tensor of the CPU meets one of the card
    card.waits                                       # what had the host wait for the card, as (operation, where)

PyTorch's own `FakeTensorMode` refuses the same mixtures, but has no values, so nothing can be generated with it; and
it has no gradients on a card where PyTorch was built without CUDA. Not modelled: kernels, their precision, streams.
"""

import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
LIBRARY = str(Path(__file__).resolve().parent.parent / "backpack_lib")
aten = torch.ops.aten
# Operations whose result the host has to have before it can go on, or whose size only the card knows.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.unique_dim, aten._unique2, aten._unique, aten.unique_consecutive,
    aten.masked_select, aten.equal, aten.is_nonzero, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
COPIES = (aten.copy_, aten._to_copy)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)  # by numbers of the host, too


class OnCard(torch.Tensor):
    """A tensor that says it is on the card. For C++ it is on "meta", which has gradients and no memory."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("meta"), requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __deepcopy__(self, known):
        copied = OnCard(self.held.detach().clone())
        copied = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        return known.setdefault(id(self), copied)

    def __format__(self, how):
        return format(self.cpu(), how)

    def __repr__(self):
        return f"OnCard({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        raise RuntimeError("A tensor of the card was used outside of `with Card()`.")


def _held(tensor):
    return tensor.held if isinstance(tensor, OnCard) else tensor


class _Functions(torch.overrides.TorchFunctionMode):
    """What asks for the card by name, before C++ looks for a driver."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        arguments, named = tree_map(_with_number, (tuple(arguments), named or {}))
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # by lists, which C++ would put on "meta"
            arguments = (arguments[0], _index(arguments[1]), *arguments[2:])
        if function in (torch.tensor, torch.as_tensor) and named.get("device") == CUDA:
            return function(*arguments, **named | {"device": CPU}).to(CUDA)
        if function is torch.Tensor.new_tensor and isinstance(arguments[0], OnCard):
            return torch.tensor(*arguments[1:], **{"dtype": arguments[0].dtype} | named).to(CUDA)
        return function(*arguments, **named)


def _index(index):
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index, dtype=torch.long if not index else None) if isinstance(index, list) else index


def _with_number(value):
    if (
        value in ("cuda", "cuda:0")
        if isinstance(value, str)
        else isinstance(value, torch.device) and value.type == "cuda"
    ):
        return CUDA
    return value


class Card(TorchDispatchMode):
    """Within it, tensors can be on a card. waits: a list of (operation, where)."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __enter__(self):
        self.around = ExitStack()
        self.around.enter_context(patch.object(torch.cuda, "_lazy_init"))
        # In inference mode operations would come whole that are made of others.
        self.around.enter_context(patch.multiple(torch.inference_mode, __enter__=_begin_no_grad, __exit__=_end_no_grad))
        self.around.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
        self.around.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        self.around.enter_context(patch.object(torch.nn.Module, "to", self._module_to))
        self.around.enter_context(_Functions())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.around.close()

    @property
    def _module_to(self):
        to = torch.nn.Module.to

        def moved(module, *where, **named):
            asked = next((w for w in where if isinstance(w, str | torch.device)), "cpu")
            return self.move(module) if torch.device(asked).type == "cuda" else to(module, *where, **named)

        return moved

    def move(self, what):
        """A tensor or a model of the CPU, on the card. (The model itself, whose shared weights stay shared.)"""
        if isinstance(what, torch.Tensor):
            return what if isinstance(what, OnCard) else OnCard(what)
        moved = {}
        for module in what.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not isinstance(parameter, OnCard):
                    if id(parameter) not in moved:
                        made = torch.nn.Parameter(OnCard(parameter.data), parameter.requires_grad)
                        moved[id(parameter)] = parameter, made
                    module._parameters[name] = moved[id(parameter)][1]
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None or isinstance(buffer, OnCard) else OnCard(buffer)
        return what

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named, operation = dict(named or {}), function.overloadpacket
        tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
        self._check(operation, arguments, tensors)
        on_card = any(isinstance(tensor, OnCard) for tensor in tensors)
        device = named.get("device")
        if device is not None:
            named["device"] = CPU
        to_card = on_card if device is None else torch.device(device).type != "cpu"
        if operation is aten.copy_:
            to_card = isinstance(arguments[0], OnCard)
        if self._waits(operation, arguments, named, on_card, to_card):
            self.waits.append((str(operation), _caller()))
        if operation is aten._fused_sdp_choice:
            return 0  # the plain formula
        made = function(*tree_map(_held, arguments), **tree_map(_held, named))
        given = {id(_held(tensor)): tensor for tensor in tensors}  # what is changed in place comes back as it was

        def wrapped(result):
            if id(result) in given:
                return given[id(result)]
            return OnCard(result) if to_card else result

        return tree_map_only(torch.Tensor, wrapped, made)

    @staticmethod
    def _check(operation, arguments, tensors):
        if operation in COPIES:
            return
        if operation in INDEXING:
            tensors = [arguments[0], *(t for t in arguments[2:3] if isinstance(t, torch.Tensor))]
            indices = [index for index in arguments[1] if isinstance(index, OnCard)]
            tensors += indices if not isinstance(arguments[0], OnCard) else []
        kinds = {isinstance(tensor, OnCard) for tensor in tensors if tensor.dim() or isinstance(tensor, OnCard)}
        if len(kinds) > 1:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found cuda:0 and cpu "
                f"in {operation}, from {_caller()}"
            )

    @staticmethod
    def _waits(operation, arguments, named, on_card, to_card) -> bool:
        if operation in INDEXING:
            masks = [i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1]]
            sent = [isinstance(i, torch.Tensor) and not isinstance(i, OnCard) for i in arguments[1]]
            return isinstance(arguments[0], OnCard) and (any(masks) or any(sent))
        if operation in COPIES:
            source = arguments[1] if operation is aten.copy_ else arguments[0]
            blocking = not (arguments[2] if len(arguments) > 2 else named.get("non_blocking", False))
            return (
                isinstance(source, OnCard) != to_card
                and (blocking or not to_card)
                and source.device != (CUDA if to_card else CPU)
            )
        return on_card and operation in WAITING


def _begin_no_grad(context):
    context.before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)


def _end_no_grad(context, *error):
    torch.set_grad_enabled(context.before)


def _caller() -> str:
    """Where in the library the operation was asked for, or in transformers, if there."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(LIBRARY) or "/transformers/" in f.filename]
    return f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "outside of the library"
