"""convert(): a checkpoint in another format, its codes kept bit for bit, or in float.

Nothing is quantized again. What is read is read layer by layer, decoded into codes and scales by the format that it is
in, and written by the one that is asked for. So 2:4 sparse checkpoints whose format nothing else reads any more
(`sparse-24-bitmask`) become ordinary ones with their zeros in them, or quantkit's own that stay packed; int8 of
bitsandbytes becomes compressed-tensors' and back; and everything that can be decoded becomes float.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from quantkit import formats
from quantkit.activations import Activations, remembered
from quantkit.checkpoint import Hub, Source, Tensors, compressed_as, linears, open_folder, read_config
from quantkit.dequantization import dequantized
from quantkit.durable import write_error, write_json, write_text
from quantkit.errors import CheckpointError, RecipeError
from quantkit.hf import put_layers, quantized_layers
from quantkit.identity import identity
from quantkit.inspection import inspect_checkpoint
from quantkit.linears import linear_modules
from quantkit.modules import QuantizedLinear
from quantkit.naming import float_layout, names_of
from quantkit.output import partial_folder, refuse_existing, refuse_full_disk
from quantkit.progress import track
from quantkit.report import conversion_card
from quantkit.scheme import FLOAT, Scheme
from quantkit.shards import ShardReader, ShardWriter
from quantkit.version import __version__

DENSE = "dense"
TARGETS = (DENSE, *formats.FORMATS)
"""What a checkpoint can be made into: float, or one of the formats."""
ACTIVATIONS = ("same", "none", "token")
THRESHOLD = formats.bitsandbytes.THRESHOLD
RECORD = "quantkit_conversion.json"
RECIPE = "quantkit_recipe.json"

log = logging.getLogger("quantkit")


@dataclass
class Conversion:
    """What was converted.

    Attributes:
        source: what the user called the checkpoint.
        was: its format, `float` where it isn't compressed.
        now: what it was made into.
        schemes: how many layers went from which scheme to which, as `int8 -> int8, activations per token`.
        bytes_before: bytes of all tensors.
        bytes_after: the same, of the result.
        notes: what a reader should know.
    """

    source: str
    was: str
    now: str
    schemes: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def facts(self) -> dict[str, str]:
        """What a model card says of it, by a word for each."""
        layers = {f"layers: {change}": str(count) for change, count in self.schemes.items()}
        return {
            "was": self.was,
            "bytes of tensors": f"{self.bytes_before:,} before, {self.bytes_after:,} after",
        } | layers

    def card(self, source: Source) -> str:
        """The result's model card."""
        return conversion_card(source, "float" if self.now == DENSE else self.now, self.facts(), self.notes)

    def to_text(self) -> str:
        """A few lines."""
        lines = [f"{self.source}: {self.was} to {self.now}, {self.bytes_before:,} to {self.bytes_after:,} bytes"]
        lines += [f"  {count} layers: {change}" for change, count in self.schemes.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@dataclass(frozen=True)
class Layer:
    """A linear layer on its way: its name in the model and on disk, what its numbers are and will be.

    Attributes:
        name: in the model.
        prefix: what its tensors' names on disk begin with.
        scheme: as it is stored; None for a float weight.
        packed: the layer that its tensors fill; None for a float weight.
        sizes: N and K.
        transposed: whether the model has the weight as [K, N].
    """

    name: str
    prefix: str
    scheme: Scheme | None
    packed: QuantizedLinear | None
    sizes: tuple[int, int]
    transposed: bool

    def read(self, weights: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Its codes [N, K], their scale and that of static activations; a float weight with scales of 1."""
        if self.packed is None:
            weight = weights.get(f"{self.prefix}weight")
            weight = weight.t().contiguous() if self.transposed else weight
            return weight, weight.new_ones(len(weight), 1), None
        stored = {leaf: weights.get(self.prefix + leaf) for leaf in self.packed.stored}
        layout = formats.FORMATS[self.packed.format]
        codes, scale = layout.decompress(self.packed.scheme, stored, self.sizes[1], self.transposed)
        return codes, scale, stored.get("input_scale")


def convert(
    model: str | Path,
    output: str | Path,
    *,
    to: str,
    activations: str = "same",
    max_shard_bytes: int = 5 * 10**9,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write a checkpoint to `output` in another format, codes bit for bit, and return what was done.

    Args:
        model: a folder or hub id.
        output: a folder that doesn't exist yet, or is empty.
        to: `dense` (float), `compressed-tensors`, `bitsandbytes` or `quantkit`. In quantkit's own every layer whose
            codes are 2:4 sparse is packed, and of a float checkpoint every such weight.
        activations: `same` as they are (LLM.int8's are left in float where a format doesn't know them), `none` to leave
            them in float, `token` to quantize them to the weights' dtype by token.
        max_shard_bytes: bytes of the largest file to write.
        revision: branch, tag or commit on the hub.
        token: access token for the hub.
        cache_dir: the hub's cache.
        trust_remote_code: let the model's folder run its own Python code.
        progress: show progress on stderr.

    Raises:
        QuantkitError: it can't be read, or the format can't hold it; then `output` doesn't exist.
    """
    if to not in TARGETS:
        raise RecipeError(f"--to {to!r} is unknown; use one of {', '.join(TARGETS)}")
    if activations not in ACTIVATIONS:
        raise RecipeError(f"--activations {activations!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    target, hub = refuse_existing(output), Hub(revision, token, cache_dir, trust_remote_code, progress)
    if to == DENSE and activations != "same":
        raise RecipeError(f"--activations {activations} says nothing of a float checkpoint; leave it out")
    source = open_folder(model, hub, _as_float if to == DENSE else _as_it_is)
    recorded = remembered(source.skeleton)
    if recorded and to not in (DENSE, formats.native.NAME):
        raise CheckpointError(
            f"{source.name} says what is done to its activations, which {to} cannot; convert it --to "
            f"{formats.native.NAME} or {DENSE}"
        )
    work = _dense(source) if to == DENSE else _Transcoding(source, formats.FORMATS[to], activations)
    refuse_full_disk(target, work.done.bytes_before * (4 if to == DENSE else 2))
    with partial_folder(target, {"convert": identity(source), "to": to, "version": __version__}) as folder:
        writer = ShardWriter(folder, max_shard_bytes)
        for tensors in track(work.tensors(), "converting", work.count, "tensor", disable=not progress):
            writer.add(tensors)
            writer.flush()
        writer.finish()
        work.done.bytes_after = writer.nbytes
        write_json(folder / "config.json", _with_activations(work.config(), recorded))
        _copy(source, folder)
        work.check(folder)
        write_json(folder / RECORD, work.done.to_dict() | {"quantkit": __version__})
        write_text(folder / "README.md", work.done.card(source))
    for note in work.done.notes:
        log.warning("%s", note)
    return work.done


def _with_activations(config: dict[str, Any], recorded: Activations) -> dict[str, Any]:
    """A config that also says what is done to activations, where there is something to say."""
    if not recorded:
        return config
    return config | {
        "quantization_config": formats.native.with_activations(config.get("quantization_config"), recorded)
    }


def _as_it_is(source: Source) -> tuple[Tensors, dict[str, Any]]:
    return source.weights, source.config


def _as_float(source: Source) -> tuple[Tensors, dict[str, Any]]:
    shapes, transposed = float_layout(source)
    return dequantized(source.weights, source.config, source.name, shapes=shapes, transposed=transposed)


def _copy(source: Source, folder: Path) -> None:
    """Copy what is no weight: tokenizer, generation config, licence, and the recipe that made the codes."""
    files = list(source.files)
    if source.folder is not None and (source.folder / RECIPE).is_file():
        files.append(source.folder / RECIPE)
    try:
        for path in files:
            shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise write_error(error, folder / Path(error.filename or "").name) from error


@dataclass
class _Work:
    """What `convert` carries out: tensors one after the other, the config, and a look at the result."""

    done: Conversion
    count: int
    tensors: Callable[[], Iterator[dict[str, torch.Tensor]]]
    config: Callable[[], dict[str, Any]]
    check: Callable[[Path], None]


def _dense(source: Source) -> _Work:
    """The work of a float checkpoint: its tensors are decoded one by one."""
    if isinstance(source.weights, ShardReader):
        raise CheckpointError(f"{source.name} is in float already; there is nothing to convert")
    stored = read_config(source.folder) if source.folder is not None else {}
    before = source.weights.nbytes if source.folder is None else ShardReader(source.folder).nbytes
    done = Conversion(source.name, str(compressed_as(stored)), DENSE, bytes_before=before)

    def tensors() -> Iterator[dict[str, torch.Tensor]]:
        for name in source.weights.tensors:
            yield {name: source.weights.get(name)}

    return _Work(done, len(source.weights.tensors), tensors, lambda: source.config, _refuse_problems)


def _refuse_problems(folder: Path) -> None:
    """Return nothing; raise CheckpointError when `inspect` finds something wrong with a written checkpoint."""
    problems = inspect_checkpoint(folder).problems
    if problems:
        raise CheckpointError(f"the result is not what its loaders demand: {problems[0]}; the source may be damaged")


class _Transcoding(_Work):
    """The work of a checkpoint whose codes go into another format."""

    def __init__(self, source: Source, layout: ModuleType, activations: str) -> None:
        self.source, self.layout, self.activations = source, layout, activations
        self.weights = source.weights
        stored = source.config.get("quantization_config")
        self.was = None if stored is None else formats.of_config(stored, source.name)
        was = "float" if self.was is None else self.was.NAME
        done = Conversion(source.name, was, layout.NAME, bytes_before=self.weights.nbytes)
        self.caches = self._put_layers(stored)
        self.layers = {layer.name: layer for layer in self._layers()}
        self.made: dict[str, Scheme] = {}
        taken = {layer.prefix + leaf for layer in self.layers.values() for leaf in _leaves(layer)}
        self.rest = [key for key in self.weights.tensors if key not in taken]
        if self.was is None and layout is not formats.native:
            raise CheckpointError(f"{source.name} is in float, and has no codes to convert; use `quantkit quantize`")
        for layer in self.layers.values():
            self._scheme_for(layer)  # refused before anything is written
        count = len(self.rest) + len(self.layers)
        super().__init__(done, count, self._tensors, self._config, self._check)

    def _put_layers(self, stored: Any) -> tuple[str, ...]:
        """The names of tensors that scale a server's cache; the skeleton gets its packed layers."""
        if self.was is None:
            return ()
        parsed, tensors = self.was.parse(stored), self.weights.tensors
        conversions = put_layers(self.source.skeleton, self.was, parsed, tensors, "auto")
        if conversions.merged:
            first = next(iter(conversions.names))
            raise CheckpointError(
                f"{first!r} of {self.source.name} makes a weight together with others (experts, or parts that are "
                "merged while they are loaded), which is not converted; use --to dense and quantize the result"
            )
        return tuple(key for key in tensors if key.rpartition(".")[2] in parsed.cache_scales)

    def _layers(self) -> Iterator[Layer]:
        """Every layer that is in codes, or a float weight that may be 2:4 sparse."""
        model = self.source.skeleton
        keys = {o.parameter: key for key, o in names_of(self.source).items() if o.parameter and not o.converted}
        for name, layer in quantized_layers(model):
            first = keys.get(f"{name}.{next(iter(layer.stored))}")
            if first is None:
                raise CheckpointError(f"{self.source.name} holds no tensor for {name!r}; download it again")
            sizes = layer.out_features, layer.in_features
            yield Layer(name, f"{first.rpartition('.')[0]}.", layer.scheme, layer, sizes, layer.transposed)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        for name, module, in_features, out_features, transposed in linear_modules(model):
            key = keys.get(f"{name}.weight", "")
            wanted = self.layout is formats.native and module is not head and key.endswith(".weight")
            if wanted and in_features % 4 == 0:
                yield Layer(name, key.removesuffix("weight"), None, None, (out_features, in_features), transposed)

    def _scheme_for(self, layer: Layer) -> Scheme | None:
        """The scheme that a layer's codes will have, but for sparsity; None for a float weight.

        Raises:
            RecipeError: the format can't say it.
        """
        if layer.scheme is None or layer.scheme.is_float:
            return None
        made = replace(layer.scheme, sparsity=None)
        if made.outlier_columns is not None and self.layout is not formats.native:
            raise RecipeError(
                f"{layer.name} has columns in float, which only quantkit's own format holds; use --to dense"
            )
        if made.outlier_columns is not None:
            raise RecipeError(f"{layer.name} is in quantkit's own format already; there is nothing to convert")
        if self.layout is formats.bitsandbytes:
            return self._of_bitsandbytes(layer, made)
        choice = self.activations
        if choice == "same" and made.threshold is not None and self.layout is formats.compressed_tensors:
            choice = "none"
        if choice != "same":
            dtype = made.weight_dtype if choice == "token" else None
            made = replace(made, activation_dtype=dtype, activation="token", activation_range="absmax", threshold=None)
        reason = self.layout.reason_against(made)
        if reason is not None:
            raise RecipeError(
                f"{layer.name} is {made.label}, and {self.layout.NAME} cannot hold it: {reason}; use --to dense"
            )
        return made

    def _of_bitsandbytes(self, layer: Layer, scheme: Scheme) -> Scheme:
        """LLM.int8's scheme, for codes that it can hold: int8 with a scale a row, or one for all."""
        fits = scheme.weight_dtype == "int8" and scheme.group_size is None and scheme.weight_granularity != "block"
        if not fits or self.activations != "same":
            what = f"it is {layer.scheme.label}" if not fits and layer.scheme else "its activations are LLM.int8's"
            raise RecipeError(
                f"{layer.name} cannot be bitsandbytes int8, which has a scale a row and LLM.int8's activations "
                f"({what}); use another --to, or leave --activations out"
            )
        return Scheme("int8", activation_dtype="int8", threshold=scheme.threshold or THRESHOLD)

    def _tensors(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of every layer, then the others, as they are."""
        for layer in self.layers.values():
            yield {layer.prefix + leaf: tensor for leaf, tensor in self._stored(layer).items()}
        dropped = () if self.layout is formats.compressed_tensors else self.caches
        if dropped:
            self.done.notes.append("scales of a server's cache are left out: the format has no word for them")
        for key in self.rest:
            if key not in dropped:
                yield {key: self.weights.get(key)}

    def _stored(self, layer: Layer) -> dict[str, torch.Tensor]:
        """What is written for a layer; its scheme is noted."""
        codes, scale, static = layer.read(self.weights)
        scheme = self._scheme_for(layer)
        stored: dict[str, torch.Tensor] | None = None
        if self.layout is formats.native:
            pattern = (layer.scheme.sparsity if layer.scheme is not None else None) or "2:4"
            sparse = Scheme(FLOAT, sparsity=pattern) if scheme is None else replace(scheme, sparsity=pattern)
            stored = self._packed(sparse, codes, scale, static)
            scheme = scheme if stored is None else sparse
        was = "float" if layer.scheme is None else layer.scheme.label
        if stored is None and scheme is None:
            return {"weight": codes.t().contiguous() if layer.transposed else codes}
        if stored is None:
            assert scheme is not None
            scale = scale.expand(len(codes), 1).contiguous() if self._by_row(scheme, scale) else scale
            stored = self.layout.compress(
                scheme, codes.contiguous(), scale, static_of(scheme, static), layer.transposed
            )
        if scheme is not None:
            self.made[layer.name] = scheme
            change = f"{was} -> {scheme.label}"
            self.done.schemes[change] = self.done.schemes.get(change, 0) + 1
        return stored

    @staticmethod
    def _by_row(scheme: Scheme, scale: torch.Tensor) -> bool:
        """Whether a weight's one scale must be written once a row."""
        return scheme.weight_granularity == "row" and scheme.group_size is None and scale.ndim == 1

    def _packed(
        self, scheme: Scheme, codes: torch.Tensor, scale: torch.Tensor, static: torch.Tensor | None
    ) -> dict[str, torch.Tensor] | None:
        """What is stored of codes that are 2:4 sparse; None where they aren't."""
        if codes.shape[1] % 4:
            return None
        try:
            found: dict[str, torch.Tensor] = self.layout.compress(scheme, codes, scale, static_of(scheme, static))
        except ValueError:
            return None
        return found

    def _config(self) -> dict[str, Any]:
        """config.json of the result."""
        if not self.made:
            what = "no weight of it is 2:4 sparse" if self.layout is formats.native else "no layer of it has codes"
            raise CheckpointError(f"{self.source.name}: {what}, and nothing would be converted; use --to dense")
        config = {key: value for key, value in self.source.config.items() if key != "compression_config"}
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in self.made.items():
            by_scheme.setdefault(scheme, []).append(name)
        left = self._left()
        configs = [self.layout.config(scheme, names, left) for scheme, names in by_scheme.items()]
        config["quantization_config"] = self._joined(configs, list(by_scheme.values()))
        return config

    def _left(self) -> list[str]:
        """The linear layers that are in float, by their names in the model and on disk."""
        keys = {o.parameter: key for key, o in names_of(self.source).items() if o.parameter and not o.converted}
        names = [name for name, _ in linears(self.source.skeleton)]
        names += [name for name, *_ in linear_modules(self.source.skeleton)]
        names += [name for name, _ in quantized_layers(self.source.skeleton)]
        found: list[str] = []
        for name in dict.fromkeys(names):
            if name not in self.made:
                found += [name, keys.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")]
        return list(dict.fromkeys(found))

    def _joined(self, configs: list[dict[str, Any]], modules: list[list[str]]) -> dict[str, Any]:
        """One config of several that each are of some of the modules."""
        first, *others = configs
        if self.layout is formats.native:
            return formats.native.joined(configs)
        if self.layout is formats.bitsandbytes:
            if others:
                raise RecipeError("layers of this checkpoint have several thresholds, and bitsandbytes has one")
            return first
        stored = self.source.config["quantization_config"]
        if self.was is formats.compressed_tensors and stored.get("kv_cache_scheme"):
            first |= {"kv_cache_scheme": stored["kv_cache_scheme"]}
        if others:
            groups = [
                each["config_groups"]["group_0"] | {"targets": names}
                for each, names in zip(configs, modules, strict=True)
            ]
            same = len({each["format"] for each in configs}) == 1
            first |= {"config_groups": {f"group_{number}": group for number, group in enumerate(groups)}}
            first |= {} if same else {"format": "mixed-precision"}
        return first

    def _check(self, folder: Path) -> None:
        """Return nothing; raise CheckpointError unless every layer's codes and scales are read back as they were."""
        _refuse_problems(folder)
        written = ShardReader(folder)
        for name, scheme in self.made.items():
            layer = self.layers[name]
            leaves = self.layout.tensor_specs(scheme, *layer.sizes, torch.float32, layer.transposed)
            stored = {leaf: written.get(layer.prefix + leaf) for leaf in leaves}
            codes, scale = self.layout.decompress(scheme, stored, layer.sizes[1], layer.transposed)
            before, scale_before, _ = layer.read(self.weights)
            if not same_numbers(codes, before) or not _same_scale(scale, scale_before):
                raise CheckpointError(
                    f"read back from {folder}, {name!r} has other codes than its source; check the disk"
                )


def static_of(scheme: Scheme, static: torch.Tensor | None) -> torch.Tensor | None:
    """The scale of activations for a scheme that has one stored."""
    return static if scheme.is_static else None


def _leaves(layer: Layer) -> Mapping[str, Any]:
    """The last parts of the names of a layer's tensors on disk, bias aside."""
    return {"weight": None} if layer.packed is None else layer.packed.stored


def same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether codes or floats are equal bit for bit, but that a -0 of one may be a 0 of the other."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype.itemsize > 1:
        return torch.equal(one, other)
    raw, expected = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    differ = raw != expected
    zeros = (raw & 0x7F == 0) & (expected & 0x7F == 0) if one.is_floating_point() else torch.zeros_like(differ)
    return not bool((differ & ~zeros).any())


def _same_scale(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether scales are equal, or (through bitsandbytes' SCB) off by roundings of float32."""
    limit = 2.0**-22 * other.float().abs()
    return bool(((one.float() - other.float()).abs() <= limit).all())
