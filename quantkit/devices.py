"""Which device to work on."""

import torch

from quantkit.errors import QuantkitError
from quantkit.launched import launched


def pick_device(device: str) -> torch.device:
    """The torch device of `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Of several processes that were launched on one machine each has a GPU of its own, unless a number is given.

    Raises:
        QuantkitError: another word, or a GPU that isn't there.
    """
    own = launched().local_rank if launched().count > 1 else None
    if own is not None and torch.cuda.is_available() and device in ("auto", "cuda"):
        device = f"cuda:{own}"
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
