"""load(): a model from disk, compressed or not, with packed weights packed in memory."""

import functools
import inspect
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from quantkit_kernels.backends import BACKENDS
from torch import nn

from quantkit import attention as attentions
from quantkit import formats, modules, skipping
from quantkit.checkpoint import Hub, auto_class, build_skeleton, read_config, refuse_untrusted, resolve
from quantkit.devices import pick_device
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.linears import linear_modules
from quantkit.modules import QuantizedLinear
from quantkit.shards import ShardReader

log = logging.getLogger("quantkit")
SCALES = ("weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "input_scale", "SCB")
"""The last parts of the names of tensors without which codes are no weights."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    *,
    keep_decoded: bool | None = None,
    skip_zeros: bool = False,
    attention: str = "auto",
    tensor_parallel: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The transformers model of a folder or hub id, in eval mode.

    Layers that are compressed in a format that quantkit reads become `QuantizedLinear`: codes and scales stay as they
    are on disk, and `save_pretrained` writes them back. A float checkpoint gives the plain model.

    Args:
        path: a folder or hub id.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: dtype of everything that isn't compressed; None for what the checkpoint says.
        backend: `auto`, `torch` or `triton`: which implementation of the ops to use.
        keep_decoded: on a CPU, keep weights that would be decoded at every call as they are decoded: faster with few
            tokens, for 2 bytes a weight more in bfloat16 and 4 in float32 (see `QuantizedLinear`). None keeps those
            that are packed without zeros (2:4), False none.
        skip_zeros: let linear layers whose input is often zero, which a pass over random tokens shows, read only the
            rows of their weights that they need: faster with few tokens, different by rounding (see
            `quantkit.skipping`).
        attention: `auto` runs what transformers calls `sdpa` by quantkit's function on a CPU, faster and different by
            rounding (see `quantkit.attention`), where the model's code doesn't ask for that name; its config then
            says `quantkit`. `transformers` leaves all attention as transformers chose it.
        tensor_parallel: spread it over all processes of the job that torchrun started, by the plan that transformers
            has for the architecture; each reads its slice of every layer.
        revision: branch, tag or commit on the hub.
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let the model's folder run its own Python code.

    Raises:
        CheckpointError: the files are missing, damaged, or compressed in a way that quantkit doesn't read.
        QuantkitError: the device, dtype, backend or attention is unknown.
    """
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    from quantkit.hf import QuantkitConfig

    place = pick_device(device)
    if backend not in BACKENDS:
        raise QuantkitError(f"backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if dtype is not None and dtype not in (*DTYPES, *DTYPES.values()):
        raise QuantkitError(f"dtype {dtype!r} is none that a model can run in; use one of {', '.join(DTYPES)}")
    if attention not in attentions.CHOICES:
        raise QuantkitError(f"attention {attention!r} is unknown; use one of {', '.join(attentions.CHOICES)}")
    hub = Hub(revision, token, cache_dir, trust_remote_code)
    folder = resolve(path, hub)
    said = read_config(folder)
    refuse_untrusted(said, str(path), hub)
    stored = said.get("quantization_config")
    if stored is not None and formats.of_config(stored, str(path)).parse(stored).cache_scales:
        log.warning("%s has scales for keys and values in FP8; the cache here has the model's dtype", path)
    build_skeleton(folder, hub, ShardReader(folder))  # which refuses sizes that the files cannot fill
    parallel = {"distributed_config": DistributedConfig(tp_plan="auto")} if tensor_parallel else {}
    if not parallel and place.type != "cpu":
        parallel = {"device_map": {"": place}}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if stored is not None:
            config.quantization_config = QuantkitConfig.wrapped(stored, backend)
        model, info = auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **parallel,
        )
    except QuantkitError:
        raise
    except Exception as error:  # whatever a config's values do to transformers
        reason = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"transformers cannot load {path}: {reason}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if info.get(kind):
            name = sorted(str(key) for key in info[kind])[0]
            what = _remedy(info.get("unexpected_keys") or ())
            raise CheckpointError(f"{path}: {kind.replace('_', ' ')}, {name} first; {what}")
    _refuse_unexpected(model, info.get("unexpected_keys") or (), str(path))
    if keep_decoded is False:
        modules.keep_decoded(model, keep=False)
    if keep_decoded and (place.type != "cpu" or not modules.keep_decoded(model)):
        log.warning("keep_decoded is unused: no layer of %s decodes its weight on a CPU", path)
    if attention == "auto" and place.type == "cpu":
        _take_attention(model)
    model.eval()
    if skip_zeros:
        _skip_zeros(model, str(path))
    return model


def _skip_zeros(model: nn.Module, name: str) -> None:
    """Let layers read what they need, and say where none does."""
    found = skipping.skip_zeros(model)
    reasons = sorted({each.reason for each in found if each.reason})
    if not found:
        log.warning("skip_zeros is unused: no linear layer of %s is given zeros often", name)
    elif reasons:
        count = sum(bool(each.reason) for each in found)
        log.warning("skip_zeros leaves %d of %d layers of %s as they are: %s", count, len(found), name, reasons[0])


def _take_attention(model: nn.Module) -> None:
    """Let quantkit's function compute what is `sdpa` in the model, unless its code asks for that name.

    A part of the model whose attention doesn't come from transformers' registry, or isn't `sdpa`, stays as it is.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface

    if any(_names_sdpa(name) for name in _sources(model, PreTrainedModel.__mro__)):
        return
    configs: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            configs.setdefault(id(module.config), []).append(module)
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    for parts in configs.values():
        config = parts[0].config
        if config._attn_implementation == "sdpa" and all(part._can_set_attn_implementation() for part in parts):
            if attentions.NAME not in functions.valid_keys():
                AttentionInterface.register(attentions.NAME, attentions.on_a_cpu(functions["sdpa"]))
                AttentionMaskInterface.register(attentions.NAME, masks["sdpa"])
            config._attn_implementation_internal = attentions.NAME


def _sources(model: nn.Module, left_out: tuple[type, ...]) -> set[str]:
    """The names of the Python modules that the classes of the model's modules are in, but for those left out."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    names = {kind.__module__ for kind in kinds.difference(left_out)}
    return {name for name in names if not name.startswith(("torch.", "quantkit."))}


@functools.cache
def _names_sdpa(module: str) -> bool:
    """Whether a Python module's code asks for that name, or can't be read."""
    try:
        return attentions.names_sdpa(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return True


def _remedy(unexpected: Iterable[str]) -> str:
    """What to do about missing tensors: where codes have no place in the model, it is their names that are wrong."""
    codes = sorted(key.removesuffix(".weight_scale") for key in unexpected if key.endswith(".weight_scale"))
    if not codes:
        return "download the checkpoint again"
    return (
        f"it holds {codes[0]!r} instead, a name that transformers doesn't know in this architecture: load it with the "
        "software that wrote it"
    )


def _refuse_unexpected(model: nn.Module, keys: Iterable[str], name: str) -> None:
    """Raise CheckpointError for a tensor of a quantized layer that the model has no place for (a scale, a zero point).

    Without it the layer's weight means something else. Other tensors that the model doesn't use do no harm: float
    checkpoints have them, and `quantize` copies them; so do whole layers that it doesn't use.
    """
    layers = {module for module, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    layers |= {module for module, *_ in linear_modules(model)}
    prefix, unexpected = getattr(model, "base_model_prefix", ""), set(keys)
    for key in sorted(unexpected):
        module, _, leaf = key.rpartition(".")
        own = leaf != "bias" and bool(layers.intersection((module, f"{prefix}.{module}")))
        used = unexpected.isdisjoint((f"{module}.weight", f"{module}.weight_packed"))
        if own or (leaf in SCALES and used):
            raise CheckpointError(
                f"tensor {key!r} of {name} is not part of the scheme that its quantization_config gives the layer; "
                "load it with the software that wrote it"
            )
