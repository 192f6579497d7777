"""Hugging Face models, tensor by tensor: where they lie, what they are made of, which file key makes which parameter.

Together with `naming`, `loading` and `hf` this is the only home of transformers, so that its churn has few addresses.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from quantkit.activations import apply, remember, remembered, taken_out
from quantkit.building import bounded
from quantkit.errors import CheckpointError
from quantkit.headers import find, weights_of
from quantkit.hub import Hub as Hub
from quantkit.hub import download
from quantkit.shards import PICKLES, ShardReader, TensorInfo
from quantkit.untrusted import read_json, refuse_adapter, refuse_counts, refuse_elsewhere, refuse_links

SAFE_FILES = ("*.safetensors", "*.index.json")
OTHER_WEIGHTS = ("*.h5", "*.msgpack", "*.onnx", "*.gguf", *PICKLES)
WEIGHT_FILES = (*SAFE_FILES, *OTHER_WEIGHTS)
NOT_FETCHED = (*OTHER_WEIGHTS, "*/*")
READ_BY_CODE = ("*.py", "*.json")
NOT_READ_BY_CODE = (*WEIGHT_FILES, "*token*", "vocab*")
log = logging.getLogger("quantkit")

NOT_COPIED = ("config.json", "README.md", "quantkit_*.json", ".*", *WEIGHT_FILES)


class Tensors(Protocol):
    """A model's weights by checkpoint name, whether in files or in memory."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to shape and dtype."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""


@dataclass
class Source:
    """A model to be compressed: its config, its skeleton on the meta device, and its weights, not yet read.

    Attributes:
        name: what the user called it.
        folder: where its files lie, or None for a model in memory.
        config: config.json as it stands.
        skeleton: the model without weights.
        weights: the weights by checkpoint name.
        tokenizer: of a model in memory, a tokenizer to be saved beside it.
        generation_config: of a model in memory.
        files: what else lies in the folder and goes along: tokenizer, licence, code.
        copied_bytes: the bytes of these files, also where only the hub has them yet.
        whole: whether all of its files are here.
    """

    name: str
    folder: Path | None
    config: dict[str, Any]
    skeleton: nn.Module
    weights: Tensors
    tokenizer: Any = None
    generation_config: dict[str, Any] | None = None
    files: list[Path] = field(default_factory=list)
    copied_bytes: int = 0
    whole: bool = True


def quiet_transformers() -> None:
    """Turn off transformers' own progress bars and warnings, for a command line that says what matters itself."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def resolve(model: str | Path, hub: Hub) -> Path:
    """The folder of a model: itself, or a hub id's snapshot in the cache (weights other than safetensors left out).

    Raises:
        CheckpointError: neither a folder nor a hub id that can be had.
    """
    place = _locate(model, hub)
    return place if isinstance(place, Path) else _checked(download(place, hub, NOT_FETCHED))


def _checked(folder: Path) -> Path:
    """The folder, or CheckpointError when it isn't a model on its own: a link leads out, or an adapter lies in it."""
    refuse_links(folder)
    refuse_adapter(folder)
    return folder


def _locate(model: str | Path, hub: Hub) -> Path | str:
    """A model's folder, or the hub id that it must be."""
    if not isinstance(model, (str, Path)):
        raise CheckpointError(f"{model!r} is no model; give a folder, a hub id, or a transformers model in memory")
    text = str(model)
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            if hub.revision is not None:
                log.warning("--revision %s is unused: %s is a folder, not a hub id", hub.revision, text)
            return _checked(path)
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{text} cannot be opened ({error}); give a model's folder, or a hub id") from error
    if exists or text.startswith((".", "/", "~")) or text.count("/") != 1:
        kind = "is a file" if exists else "does not exist"
        raise CheckpointError(
            f"{text} {kind}; give a folder with config.json and weights, or a hub id with its owner, like org/name"
        )
    return text


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: it is missing or isn't a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    config = read_json(path, "mend or download it again")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; mend or download it again")
    refuse_counts(config, path)
    return config


Dequantize = Callable[[Source], tuple[Tensors, dict[str, Any]]]


def open_folder(model: str | Path, hub: Hub, dequantize: Dequantize | None = None) -> Source:
    """The source of a folder or hub id.

    Args:
        model: the folder or hub id.
        hub: how to find it.
        dequantize: for a model that is compressed already: gives the tensors and the config of a float model.

    Raises:
        CheckpointError: no config, not a causal language model, compressed already, or shards missing or damaged.
    """
    folder = resolve(model, hub)
    return _source(str(model), folder, hub, dequantize, lambda: ShardReader(folder))


def open_headers(model: str | Path, hub: Hub, dequantize: Dequantize | None = None) -> Source:
    """The source of a folder or hub id, whose weights may be known by names, shapes and dtypes alone.

    Of a model on the hub only config.json, the headers of its shards and, where it is trusted, its code are fetched,
    and a line on stderr says how much that was. What is in the cache is taken from there. Arguments and errors are
    those of `open_folder`; a weight that isn't in the cache cannot be read (NoPartsError).
    """
    place = _locate(model, hub)
    found = place if isinstance(place, Path) else find(place, hub, NOT_FETCHED)
    if isinstance(found, Path):
        return _source(str(model), _checked(found), hub, dequantize, lambda: ShardReader(found))
    if "config.json" not in found.sizes:
        raise CheckpointError(f"{found.name} has no config.json on the hub; give a Hugging Face model")
    folder = found.file("config.json").parent
    if hub.trust_remote_code:
        for file in found.sizes:
            if _matches(file, READ_BY_CODE) and not _matches(file, NOT_READ_BY_CODE):
                found.file(file)
    try:
        source = _source(str(model), folder, hub, dequantize, lambda: weights_of(found, folder))
    finally:
        found.say()
    source.whole = not found.missing
    source.copied_bytes = sum(size for file, size in found.sizes.items() if not _matches(file, NOT_COPIED))
    return source


def _source(
    name: str, folder: Path, hub: Hub, dequantize: Dequantize | None, open_weights: Callable[[], Tensors]
) -> Source:
    """The source of a folder that holds a config, and weights from wherever they are opened."""
    config, recorded = taken_out(read_config(folder))
    refuse_unfit(config, name, hub, compressed=dequantize is not None)
    weights = open_weights()
    skeleton = build_skeleton(folder, hub, weights)
    remember(skeleton, recorded)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not _matches(path.name, NOT_COPIED)]
    copied_bytes = sum(path.stat().st_size for path in files)
    source = Source(name, folder, config, skeleton, weights, files=files, copied_bytes=copied_bytes)
    if dequantize is not None and compressed_as(config) is not None:
        source.weights, source.config = dequantize(source)
    return source


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def compressed_as(config: dict[str, Any]) -> Any:
    """The method by which a checkpoint is compressed, or None for a float one.

    A model of several parts may say it in the config of its language model.
    """
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, dict) else {}):
        stored = holder.get("quantization_config") or holder.get("compression_config")
        if stored:
            return stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored
    return None


def refuse_unfit(config: dict[str, Any], name: str, hub: Hub, *, compressed: bool = False) -> None:
    """Return nothing; raise CheckpointError for a model that isn't a causal one, or (unless that may be) compressed."""
    method = compressed_as(config)
    if method is not None and not compressed:
        raise CheckpointError(
            f"{name} is compressed already (quant_method {method!r}); give the float model that it was made from, or "
            "--dequantize to turn it into float first"
        )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(item, str) for item in architectures):
        raise CheckpointError(f"architectures is {architectures!r} in {name}'s config.json, no list of names; mend it")
    refuse_untrusted(config, name, hub)
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    causal |= _registered()
    if not _has_code(config) and architectures and not causal.intersection(architectures):
        raise CheckpointError(
            f"{name} holds {architectures[0]}, which is not a causal language model; give one that generates text "
            "(architectures ending in ForCausalLM)"
        )


def refuse_untrusted(config: dict[str, Any], name: str, hub: Hub) -> None:
    """Return nothing; raise CheckpointError for a model that only code in its folder can build, unless it's trusted.

    So is one whose config names weights elsewhere, or code on the hub.
    """
    from transformers import CONFIG_MAPPING

    refuse_elsewhere(config, name, trusted=hub.trust_remote_code)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *CONFIG_MAPPING._extra_content}
    if _has_code(config) and not hub.trust_remote_code and str(config.get("model_type")) not in known:
        raise CheckpointError(
            f"{name} runs code of its own; pass --trust-remote-code if you have read and trust what is in its folder"
        )


def _has_code(config: dict[str, Any]) -> bool:
    """Whether a model's folder holds the code of a causal language model."""
    auto_map = config.get("auto_map")
    return isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map


def _registered() -> set[str]:
    """The names of model classes that a user's program has registered with transformers' auto classes."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    found: set[str] = set()
    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        for classes in kind._model_mapping._extra_content.values():
            found |= {each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))}
    return found


def build_skeleton(folder: Path, hub: Hub, weights: Tensors | None = None) -> nn.Module:
    """The model of a folder on the meta device: parameters without storage, buffers real.

    Args:
        folder: where its config and code are.
        hub: whether the code is trusted.
        weights: its weights; None for those in the folder.

    Raises:
        CheckpointError: transformers can't build it, or only with code that isn't trusted; or its config asks for far
            more than the weights can fill.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    refuse_untrusted(read_config(folder), str(folder), hub)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=hub.trust_remote_code)
        for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if hasattr(each, "quantization_config"):
                del each.quantization_config  # the model is that of the float weights, also where they were compressed
        weights = weights or ShardReader(folder)
        sizes = bounded(len(weights.tensors), weights.nbytes, str(folder))
        with sizes, init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, trust_remote_code=hub.trust_remote_code)
        model.tie_weights()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a config's values do to transformers
        reason = " ".join(str(error).split()) or repr(error)
        raise CheckpointError(f"transformers cannot build the model of {folder}: {reason}") from error
    skeleton: nn.Module = model
    return skeleton


def auto_class(config: Any) -> Any:
    """Transformers' auto class for a config: of causal language models, or of those that read images with text.

    A config of both kinds (a language model with a vision tower that also loads without it) goes by its architectures.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    architectures = set(getattr(config, "architectures", None) or [])
    multimodal = AutoModelForImageTextToText._model_mapping
    if type(config) in multimodal:
        classes = multimodal[type(config)]
        names = {each.__name__ for each in (classes if isinstance(classes, (list, tuple)) else (classes,))}
        if names & architectures or type(config) not in AutoModelForCausalLM._model_mapping:
            return AutoModelForImageTextToText
    return AutoModelForCausalLM


class MemoryTensors:
    """The weights of a model in memory, under the names that its checkpoint would have, ties written once."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        state = model.state_dict()
        for tied, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
            if tied in state and source in state and state[tied].data_ptr() == state[source].data_ptr():
                del state[tied]
        self._state: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
        memory = Path("(memory)")
        self.tensors = {key: TensorInfo(memory, tuple(t.shape), t.dtype) for key, t in self._state.items()}

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        return self._state[name].detach().cpu()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


def open_model(model: nn.Module, tokenizer: Any = None) -> Source:
    """The source of a model in memory, which is only read.

    Raises:
        CheckpointError: it isn't a transformers model, or is quantized already.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(f"{type(model).__name__} is no transformers PreTrainedModel; give one, or a folder")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise CheckpointError(
            f"{type(model).__name__} has tensors on the meta device (not loaded, or offloaded to disk); "
            "load all of it, or give its folder"
        )
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    # What a class that isn't transformers' own computes is for its owner to know.
    known = config if type(model).__module__.startswith("transformers.") else config | {"architectures": []}
    refuse_unfit(known, name, Hub(trust_remote_code=True))
    generation = model.generation_config.to_dict() if model.can_generate() else None
    return Source(name, None, config, model, MemoryTensors(model), tokenizer, generation)


def decoder_blocks(model: nn.Module) -> tuple[str, int]:
    """The name of the list of decoder blocks and its length: the outermost ModuleList that holds most parameters.

    Raises:
        CheckpointError: there is no such list.
    """
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = sum(parameter.numel() for parameter in module.parameters())
    if not lists or not max(lists.values()):
        raise CheckpointError(f"{type(model).__name__} has no list of layers to go through block by block")
    name = max(lists, key=lambda key: lists[key])
    return name, len(model.get_submodule(name))  # type: ignore[arg-type]


def empty_copy(model: nn.Module, *, buffers: bool = False) -> nn.Module:
    """A model of the same class and config without weights: on the meta device, but for buffers if they are asked for.

    A plain meta device falsifies buffers that a constructor computes (frequencies, masks); those of this copy are real.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        made: nn.Module = type(model)(copy.deepcopy(model.config))
    if buffers:
        made.tie_weights()  # type: ignore[operator]
    apply(made, remembered(model))
    remember(made, remembered(model))
    return made.eval()


def use_plain_implementations(model: nn.Module, *, attention: bool = True) -> None:
    """Make the model compute in single steps: each expert's product by itself, attention as products and a softmax.

    It keeps no cache either: a block that is called again must find what it found before.
    """
    for attribute in ("_attn_implementation", "_experts_implementation"):
        if attribute == "_attn_implementation" and not attention:
            continue
        for module in model.modules():
            config = getattr(module, "config", None)
            if config is not None and getattr(config, attribute, "eager") != "eager":
                setattr(config, f"{attribute}_internal", "eager")
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", None):
            module.config.use_cache = False  # type: ignore[union-attr]


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Every parameter that shares its storage with an earlier one, to that one's name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            tied[name] = other
    return tied


def output_head(model: nn.Module) -> str | None:
    """The name of the layer that makes the logits, or None."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def input_embeddings(model: nn.Module) -> str | None:
    """The name of the module that looks token ids up, or None."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is found and name), None)


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer by name, subclasses of nn.Linear included (formats name them all, quantized or not)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def is_usual_linear(module: nn.Module) -> bool:
    """Whether a linear layer is of a class that transformers with bitsandbytes knows for one."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def load_tokenizer(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The tokenizer of a folder or hub id, or None when it has none."""
    from transformers import AutoTokenizer

    folder = resolve(model, Hub(revision, token, cache_dir, trust_remote_code))
    if (folder / "config.json").exists():
        read_config(folder)  # which transformers reads too, to know what tokenizer it needs
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")) and not any(folder.glob("*.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the files' values do to transformers
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
