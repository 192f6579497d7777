"""Rules of sizes that vLLM and SGLang share: fused layers, blocks, groups, and tensor parallelism."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from quantkit.servers.arguments import Group
from quantkit.servers.contents import Contents, Layer
from quantkit.servers.findings import Finding

ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "fc_out", "dense", "dense_4h_to_h", "wo", "w2")
"""Layers that vLLM and SGLang split along K (`RowParallelLinear`), by the last part of their names."""

TURNED = ("c_attn", "c_proj", "c_fc")
"""Layers whose `weight` both turn around while they load GPT-2 and its kin (models/gpt2.py)."""


@dataclass(frozen=True)
class Linear:
    """A linear layer as a server has it: one of the checkpoint's, or several fused.

    Attributes:
        name: the server's name of it.
        members: the checkpoint's layers, in the order in which they are fused.
        surely: whether every model of the server fuses these; of other names only some do.
    """

    name: str
    members: tuple[Layer, ...]
    surely: bool = True

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Fusion:
    """A row of a server's `packed_modules_mapping`."""

    fused: str
    members: tuple[str, ...]
    surely: bool = False


def linears(contents: Contents, fusions: Iterable[Fusion]) -> Iterator[Linear]:
    """Every linear layer but experts, the head and embeddings, as the server has it; rare fusions come beside these."""
    plain = {
        name: layer
        for name, layer in contents.layers.items()
        if layer.expert is None and name != contents.head and (layer.is_linear or layer.is_compressed)
    }
    taken: set[str] = set()
    for fusion in fusions:
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in plain):
            members = tuple(plain[key] for leaf in fusion.members if (key := f"{owner}.{leaf}") in plain)
            if len(members) < 2 or (not fusion.surely and len(members) < len(fusion.members)):
                continue
            if fusion.surely:
                taken.update(member.name for member in members)
            yield Linear(f"{owner}.{fusion.fused}", members, fusion.surely)
    yield from (Linear(name, (layer,)) for name, layer in plain.items() if name not in taken)


def experts(contents: Contents) -> dict[str, list[Layer]]:
    """The layers of all experts that lie together, by what their names begin with."""
    found: dict[str, list[Layer]] = {}
    for layer in contents.layers.values():
        if layer.expert is not None:
            found.setdefault(layer.expert["owner"], []).append(layer)
    return found


def sizes(linear: Linear, group: Group, parallel: int, source: str) -> Iterator[Finding]:
    """What doesn't divide in a quantized linear layer."""
    weights = group.weights
    columns = linear.members[0].in_features
    if weights is None or columns is None:
        return

    def error(rule: str, layer: Layer | None = None) -> Finding:
        return Finding("error", (linear.name if layer is None else layer.name,), rule, source)

    split_rows = parallel > 1 and linear.leaf not in ROW_PARALLEL
    split_columns = parallel > 1 and not split_rows
    high, wide = weights.block if weights.block is not None else (1, weights.group_size or 1)
    share = columns // parallel if split_columns else columns
    what = "a block's columns" if weights.block is not None else "the group size"
    if wide > 1 and columns % wide:
        yield error(f"its {columns} in features don't divide by {what}, {wide}")
    elif split_columns and (columns % parallel or (wide > 1 and share % wide)):
        yield error(f"its {columns} in features, split over {parallel} GPUs, don't divide by {what}, {wide}")
    rows = [member.out_features or 0 for member in linear.members]
    for member, count in zip(linear.members, rows, strict=True):
        last = member is linear.members[-1]
        if split_rows and high > 1 and (count % parallel or (count // parallel) % high):
            yield error(
                f"its {count} out features, split over {parallel}, don't divide by {high} rows of a block", member
            )
        elif high > 1 and len(rows) > 1 and not last and count % high:
            yield error(f"its {count} out features, before others in a fused layer, don't divide by {high}", member)


def attention(contents: Contents, parallel: int, source: str) -> Iterator[Finding]:
    """What doesn't divide of heads and features over GPUs."""
    if parallel == 1:
        return
    heads = contents.heads
    shared = contents.number("num_key_value_heads", "num_kv_heads") or heads
    if heads is None or shared is None:
        yield Finding("note", ("config.json",), "it says no number of heads: their split wasn't checked", source)
        return
    if heads % parallel:
        rule = f"{heads} attention heads don't divide by {parallel} GPUs"
        yield Finding("error", ("config.json num_attention_heads",), rule, source)
    if shared % parallel and parallel % shared:
        rule = f"{shared} key and value heads and {parallel} GPUs don't divide one another"
        yield Finding("error", ("config.json num_key_value_heads",), rule, source)
    inner = contents.number("intermediate_size", "n_inner", "ffn_dim")
    if inner is not None and inner % parallel:
        rule = f"{inner} features between the MLP's layers don't divide by {parallel} GPUs"
        yield Finding("error", ("config.json intermediate_size",), rule, source)


def same_scheme(
    contents: Contents, owner: str, members: Iterable[Layer], choose: Callable[[Layer], Group | None], source: str
) -> Iterator[Finding]:
    """What differs among the experts of a mixture; a server looks at the first and takes all for the same."""
    groups = [choose(layer) for layer in members]
    kinds = dict.fromkeys("float" if group is None else group.name for group in groups)
    if len(kinds) > 1:
        rule = f"all experts need the same scheme, and here there are {', '.join(kinds)}"
        yield Finding("error", (owner,), rule, source)
