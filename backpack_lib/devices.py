"""Where a model computes: one name, checked."""

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name. "auto": a CUDA GPU where there is one, else the CPU.

    An Apple GPU ("mps") has to be asked for, since it rounds otherwise and gives slightly other results.

    Raises ValueError for an unknown name, and for a device that is not here.
    """
    if str(name).split(":")[0] not in DEVICES:
        raise ValueError(f"device={name!r} is unknown; choose one of {', '.join(DEVICES)}.")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} needs a CUDA GPU, and there is none here; choose 'cpu' or 'auto'.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r} needs an Apple GPU, and there is none here; choose 'cpu' or 'auto'.")
    return device
