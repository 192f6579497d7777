"""Which device to work on."""

import torch

from quantkit.errors import QuantkitError


def pick_device(device: str) -> torch.device:
    """The torch device of `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        QuantkitError: another word, or a GPU that isn't there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise QuantkitError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise QuantkitError(
            f"device {device!r} is asked for and torch sees {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return found
