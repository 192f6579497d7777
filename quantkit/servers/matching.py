"""Which group of the config a layer has, as each server finds it by names, regexes and classes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quantkit import untrusted
from quantkit.servers.arguments import Group
from quantkit.servers.contents import Contents, Layer


@dataclass(frozen=True)
class Choice:
    """What a server takes a layer for: a group's, or float because it is ignored, or float as nothing names it."""

    group: Group | None
    ignored: bool = False


def by_target(groups: Iterable[Group]) -> dict[str, Group]:
    """Every target to its group, the last one's where several name it, in the order of the config."""
    return {target: group for group in groups for target in group.targets}


def fits(name: str, target: str) -> bool:
    """Whether a target is a name, or a regex that fits it from its start."""
    return target == name if not target.startswith("re:") else untrusted.fits(target[3:], name)


def fits_end(name: str, target: str) -> bool:
    """Whether a target fits a name as in SGLang: `fits`, or the last parts of the name."""
    return fits(name, target) or (not target.startswith("re:") and name.endswith(f".{target}"))


def first(name: str, targets: Iterable[str]) -> str | None:
    """The first target that fits a name, or None."""
    return next((target for target in targets if fits(name, target)), None)


def _apart(names: Sequence[str], ignored: Sequence[bool]) -> str:
    """The sentence for members of which only some are ignored."""
    told = [name.rpartition(".")[2] for name, each in zip(names, ignored, strict=True) if each]
    return f"ignore names only {', '.join(told)} of it"


def _class_target(targets: Iterable[str]) -> str | None:
    """The target that names linear layers by class in vLLM and SGLang, whose classes all end in `Linear`."""
    return next((target for target in targets if not target.startswith("re:") and target.lower() == "linear"), None)


def in_vllm(names: Sequence[str], fused: str, contents: Contents) -> Choice | str:
    """What vLLM takes a linear layer for, by the names of its members on disk and its own (of a plain one, the same).

    A text says why it refuses. `find_matched_target` and `should_ignore_layer` of vLLM 0.32: the layer's own name goes
    before its members', and all of these before its class; members are ignored all together or not at all.
    """
    ignored = [first(name, contents.ignore) is not None for name in names]
    if first(fused, contents.ignore) is not None or all(ignored):
        return Choice(None, ignored=True)
    if any(ignored):
        return _apart(names, ignored)
    groups = by_target(contents.groups)
    members = [first(name, groups) for name in names]
    target = first(fused, groups) or (members[0] if all(members) else None) or _class_target(groups)
    return Choice(groups[target] if target is not None else None)


def in_sglang(names: Sequence[str], fused: str, contents: Contents) -> Choice | str:
    """What SGLang takes a linear layer for, where its model class says which members a fused layer has.

    A text says why it refuses. As in vLLM, but that a plain name may be the end of a layer's, that its class goes
    before its members, and that a layer that nothing names is refused (SGLang 0.5.23).
    """

    def is_ignored(name: str) -> bool:
        return any(fits_end(name, target) for target in contents.ignore)

    ignored = [is_ignored(name) for name in names]
    if all(ignored) or fused in contents.ignore:
        return Choice(None, ignored=True)
    if any(ignored):
        return _apart(names, ignored)
    groups = by_target(contents.groups)
    members = [first(name, groups) for name in names]
    target = first(fused, groups) or _class_target(groups) or (members[0] if all(members) else None)
    return Choice(groups[target]) if target is not None else "no target names it, and ignore doesn't either"


def in_compressed_tensors(layer: Layer, contents: Contents) -> Choice:
    """What compressed-tensors 0.20, and so transformers, takes a layer for.

    Names and classes count alike, bases included; only modules that are nn.Linear or nn.Embedding are quantized. Of
    several targets a name goes before a regex, a regex before a class, and else alphabetical order decides.
    """
    name, classes = layer.module or layer.name, layer.classes

    def names(target: str) -> bool:
        return fits(name, target) or target in classes

    if any(names(target) for target in contents.ignore):
        return Choice(None, ignored=True)
    if classes and not {"Linear", "Embedding"} & set(classes):
        return Choice(None)
    groups = by_target(contents.groups)
    ordered = sorted(groups, key=lambda target: ("re:" in target, target))
    chosen = next((target for target in ordered if fits(name, target)), None)
    chosen = chosen or next((target for target in ordered if target in classes), None)
    return Choice(groups[chosen] if chosen is not None else None)
