"""How much of what meets a model's linear layers is zero, counted while the model reads text; nothing is changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quantkit_calibration.activity import Zeros
from quantkit_calibration.data import calibration_windows
from torch import nn

from quantkit import spared
from quantkit.activations import Adapted, is_linear, zeroed
from quantkit.candidates import raw_uses
from quantkit.checkpoint import Hub, decoder_blocks, use_plain_implementations
from quantkit.errors import DataError
from quantkit.exploration import explore
from quantkit.loading import load
from quantkit.modules import QuantizedLinear
from quantkit.outcome import SparsityReport
from quantkit.pairing import Pair, check_vocabulary, position_errors, require_tokenizer, tokenizer_of, window_length
from quantkit.texts import read, tokenize
from quantkit.watching import Watch

CHOICE = 16
"""Windows are chosen among this many times as many, from the start of the data, as for calibration."""


@dataclass
class Sparsity:
    """How much of what meets the linear layers of a model's blocks is zero.

    Attributes:
        model: what the user called it.
        dataset: the text's name.
        windows: how many windows were read.
        seq_len: tokens of each.
        layers: the linear layers; what was before is empty.
        notes: what a reader should know.
    """

    model: str
    dataset: str
    windows: int
    seq_len: int
    layers: list[SparsityReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in ("model", "dataset", "windows", "seq_len", "notes")}
        layers = spared.to_list(self.layers)
        for each in layers:
            each["zeros"] = each.pop("after")
            del each["before"]
        return values | {"layers": layers, "decode": spared.totals(self.layers)}

    def to_text(self) -> str:
        """A few lines."""
        tokens = self.windows * self.seq_len
        lines = [f"{self.model}: {len(self.layers)} linear layers, {tokens:,} tokens of {self.dataset}"]
        zeros = spared.zeros_lines(self.layers)
        lines += [f"  zeros      {line}" for line in zeros or ["less than 0.1% of the input of any layer"]]
        lines.append(f"  decode     {spared.decode_line(self.layers)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def input_sparsity(
    model: str | Path,
    dataset: str,
    *,
    samples: int = 32,
    seq_len: int | None = None,
    seed: int = 0,
    device: str = "auto",
    data_dir: str | Path | None = None,
    hub: Hub | None = None,
) -> Sparsity:
    """How much of what meets the linear layers of a model is zero while it reads text.

    Args:
        model: a folder or hub id, compressed or not.
        dataset: a SPEC.
        samples: how many windows are read.
        seq_len: tokens of each; None for 2048, or the model's context.
        seed: of the choice of windows.
        device: what the model runs on.
        data_dir: where known data sets lie.
        hub: how the model is found.

    Raises:
        QuantkitError: the model or the data can't be had.
    """
    hub = hub or Hub()
    texts = read(dataset, data_dir=data_dir, token=hub.token, cache_dir=hub.cache_dir)
    tokenizer = tokenizer_of(model, hub) if texts.kind != "tokens" else None
    require_tokenizer(texts, tokenizer, str(model))
    loaded = load(model, device=device, **hub.download, trust_remote_code=hub.trust_remote_code)
    length = window_length(Pair(loaded, str(model), None, ""), seq_len)
    ids = tokenize(texts, tokenizer, limit=CHOICE * samples * length).ids
    if ids.numel() < length:
        raise DataError(
            f"{texts.name} has {ids.numel():,} tokens, less than one window of seq_len {length}: give more text or "
            "choose a smaller --seq-len"
        )
    windows = calibration_windows(ids, samples, length, torch.Generator().manual_seed(seed))
    check_vocabulary(loaded, str(model), int(windows.max()))
    found = Sparsity(str(model), texts.name, len(windows), length)
    with position_errors(str(model), length):
        _count(loaded, windows, found)
    return found


def _count(model: Any, windows: torch.Tensor, found: Sparsity) -> None:
    """Run the model on each window, and fill what was found."""
    use_plain_implementations(model, attention=False)
    zeros: dict[str, Zeros] = {}
    length = windows.shape[1]

    def see(name: str, expert: int | None, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        if name not in zeros:
            zeros[name] = Zeros(length if expert is None and len(flat) % length == 0 else None)
        zeros[name].update(flat)

    blocks = decoder_blocks(model)[0]
    layers = {name: module for name, module in model.named_modules() if name.startswith(f"{blocks}.")}
    layers = {name: module for name, module in layers.items() if is_linear(module)}
    experts = _experts(model)
    with torch.no_grad(), _told(layers, see), Watch({n: (p, axis) for n, (p, axis, _) in experts.items()}, see):
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
    for name, (parameter, in_axis, out_axis) in experts.items():
        shape = (parameter.shape[out_axis], parameter.shape[in_axis])
        _add(found, name, shape, zeros.get(name), 8.0 * parameter.dtype.itemsize)
    for name, module in layers.items():
        shape, bits = _size(module)
        _add(found, name, shape, zeros.get(name), bits)
    order = {name: place for place, (name, _) in enumerate((*model.named_modules(), *model.named_parameters()))}
    found.layers.sort(key=lambda layer: order.get(layer.module, 0))
    if any(type(module).__name__ == "QuantizedExperts" for module in model.modules()):
        found.notes.append("what meets packed experts is not counted")


@contextmanager
def _told(layers: dict[str, nn.Module], see: Callable[[str, int | None, torch.Tensor], None]) -> Iterator[None]:
    """While it lasts every linear layer tells what it multiplies."""

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            limit = module.threshold if isinstance(module, Adapted) else None
            see(name, None, x if limit is None else zeroed(x, limit))

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _experts(model: Any) -> dict[str, tuple[torch.Tensor, int, int]]:
    """The parameters that hold experts in float, each with its axes of in and out features."""
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}
    if not held:
        return {}
    uses = dict(raw_uses(explore(model, groups=False)))
    return {
        name: (held[name], use.in_axis, use.out_axis)
        for name, use in uses.items()
        if name in held and use.expert_axis is not None
    }


def _size(module: Any) -> tuple[tuple[int, int], float]:
    """N and K of a linear layer, and the bits of a stored weight."""
    if isinstance(module, QuantizedLinear):
        return (module.out_features, module.in_features), float(module.scheme.bits)
    rows, columns = module.weight.shape
    bits = 8.0 * module.weight.dtype.itemsize
    return ((rows, columns) if isinstance(module, nn.Linear) else (columns, rows)), bits


def _add(found: Sparsity, name: str, shape: tuple[int, int], zeros: Zeros | None, bits: float) -> None:
    if zeros is not None and zeros.tokens:
        shares = {str(gamma): share for gamma, share in zeros.result().items()}
        load = zeros.tokens / (found.windows * found.seq_len)
        found.layers.append(SparsityReport(name, shape, {}, shares, load, bits))
