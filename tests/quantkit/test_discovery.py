"""What a trace finds in real decoder blocks, and that what it calls a fold is one."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from odd_block import HEAD, HEADS, INNER, WIDTH, OddBlock
from real_blocks import EXPECTED, GPT2, MAMBA, MIXTRAL, PLUS_ONE, Call, block_of, rows
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from quantkit.discovery import DiscoveryError, Edit, Group, LinearUse, Structure, apply_group, discover, randomize_
from quantkit.discovery.proof import Prover, rounding_bound
from quantkit.discovery.trace import record


def odd_block() -> Call:
    block = OddBlock().eval()
    randomize_(block, torch.Generator().manual_seed(0))
    return block, (torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)),), {}


def randomized(block: nn.Module) -> Call:
    """A block of our own over [2, 8, 16], with random weights."""
    randomize_(block.eval(), torch.Generator().manual_seed(0))
    return block, (torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)),), {}


def summary(structure: Structure) -> dict[str, tuple[int, dict[str, str]]]:
    """For each group its channels, and for each of its parameters `axis: power` and the offset, if any."""
    found = {}
    for group in structure.groups:
        edits = {}
        for edit in (*group.producers, *group.consumers):
            offset = f", 1 + w{'' if edit.offset == 1 else '?'}" if edit.offset else ""
            edits[edit.parameter] = f"{edit.axis}: {edit.power:+d}{offset}"
        found[group.name] = (group.channels, edits)
    return found


def row_error(expected: Any, found: Any) -> float:
    """The largest relative error of a row of the first output."""
    one, other = (value[0] if isinstance(value, tuple) else value for value in (expected, found))
    return float(((one - other).norm(dim=-1) / one.norm(dim=-1)).max())


def folded_error(call: Call, group: Group, seed: int = 5) -> tuple[float, float]:
    """The error of the block's output after a fold with random scales, on an input of its own, and the bound."""
    block, args, kwargs = call
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(args[0].shape, generator=generator)
    scale = torch.exp(2 * torch.rand(group.channels, generator=generator) - 1)
    changed = apply_group(dict(block.named_parameters()), group, scale)
    with torch.no_grad():
        expected = block(hidden, *args[1:], **kwargs)
        found = functional_call(block, changed, (hidden, *args[1:]), kwargs)
    return row_error(expected, found), rounding_bound(record(block, [(args, kwargs)]))


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_real_blocks(name: str) -> None:
    """Exactly the expected groups; each keeps the output on an input that the trace didn't see, by itself."""
    where, changes, expected = EXPECTED[name]
    call = block_of(*where, **changes)
    structure = discover(*call)
    assert summary(structure) == expected
    for group in structure.groups:
        error, bound = folded_error(call, group)
        assert error <= bound, group.name


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mixtral", "nemotron"])
def test_every_edit_of_a_group_is_needed(name: str) -> None:
    """A fold that forgets one parameter moves the output by far more than rounding: the check above can fail."""
    where, changes, _ = EXPECTED[name]
    call = block_of(*where, **changes)
    for group in discover(*call).groups:
        edits = (*group.producers, *group.consumers)
        for left_out in edits:
            producers = tuple(edit for edit in group.producers if edit is not left_out)
            consumers = tuple(edit for edit in group.consumers if edit is not left_out)
            error, bound = folded_error(call, Group(group.name, group.kind, group.channels, producers, consumers))
            assert error > 20 * bound, left_out.parameter


def test_grouped_queries_share_a_channel() -> None:
    """Two key-value heads of eight, each read by two query heads."""
    structure = discover(*block_of("llama"))
    group = next(group for group in structure.groups if group.name == "self_attn.v_proj.weight")
    head = torch.arange(16).view(2, 8)
    assert group.producers[0].channels == tuple(range(16))
    assert group.consumers[0].channels == tuple(head.repeat_interleave(2, 0).flatten().tolist())


def test_fused_rows_fold_in_part() -> None:
    """Phi-3: of [q 32, k 16, v 16] only v, of [gate 48, up 48] only up."""
    groups = {group.name: group for group in discover(*block_of("phi3")).groups}
    assert groups["self_attn.qkv_proj.weight"].producers[0].channels == (-1,) * 48 + tuple(range(16))
    assert groups["mlp.gate_up_proj.weight"].producers[0].channels == (-1,) * 48 + tuple(range(48))


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_experts_in_other_implementations(experts: str) -> None:
    """Gathered or grouped products show the same groups and uses as a loop over experts."""
    loop = discover(*block_of("mixtral", **MIXTRAL))
    other = discover(*block_of("mixtral", experts=experts, **MIXTRAL))
    assert (other.groups, other.linears) == (loop.groups, loop.linears)


def test_odd_block() -> None:
    """Nothing is known by name here: the groups, channels, router and axes follow from the data flow."""
    call = odd_block()
    structure = discover(*call)
    assert summary(structure) == {
        "alpha.flair": (WIDTH, {"alpha.flair": PLUS_ONE, **rows("mixed", "swell")}),
        "mixed.weight": (WIDTH, {"mixed.weight": "0: -1", "mixed.bias": "0: -1", "back.weight": "1: +1"}),
        "swell.weight": (INNER, {"swell.weight": "0: -1", "swell.bias": "0: -1", "shrink.weight": "1: +1"}),
        "beta.weight": (
            WIDTH,
            {"beta.weight": "0: -1", "beta.bias": "0: -1", "chooser.taste": "0: +1", "chooser.wide": "1: +1"},
        ),
        "chooser.wide": (INNER, {"chooser.wide": "2: -1", "chooser.narrow": "1: +1"}),
    }
    groups = {group.name: group for group in structure.groups}
    number = torch.full((HEADS, 3, HEAD), -1)
    number[:, 2] = torch.arange(WIDTH).view(HEADS, HEAD)
    assert groups["mixed.weight"].producers[0].channels == tuple(number.flatten().tolist())
    turns = torch.stack([torch.full((INNER,), -1), torch.arange(INNER)], 1)
    assert groups["chooser.wide"].producers[0].channels == tuple(turns.flatten().tolist())
    uses = {use.parameter: use for use in structure.linears}
    assert uses["chooser.taste"] == LinearUse(
        "chooser.taste", 0, 1, None, "router", "its output chooses experts (topk)"
    )
    assert uses["chooser.wide"] == LinearUse("chooser.wide", 1, 2, 0)
    assert uses["chooser.narrow"] == LinearUse("chooser.narrow", 1, 2, 0)
    assert structure.others == {}
    for group in structure.groups:
        error, bound = folded_error(call, group)
        assert error <= bound, group.name


def refusals(structure: Structure) -> dict[str, str]:
    return {refusal.parameter: refusal.reason for refusal in structure.refusals}


def test_refusals_name_the_operation() -> None:
    found = refusals(discover(*block_of("olmo2")))
    assert found["post_attention_layernorm.weight"] == "its output also goes to the residual stream (add)"
    assert found["self_attn.q_norm.weight"] == "its channels are mixed with each other (add)"
    assert found["mlp.gate_proj.weight"] == "it feeds silu, which doesn't keep a channel's scale"
    assert found["mlp.down_proj.weight"].startswith("it feeds mean")
    found = refusals(discover(*block_of("opt", ffn_dim=48, word_embed_proj_dim=32)))
    assert found["self_attn.q_proj.weight"].endswith("multiplied with another activation (bmm), as in attention scores")
    assert not any(name.endswith("bias") for name in found)


def test_uses_of_parameters() -> None:
    """Conv1D stores [in, out]; a router is known by its top-k; the rest is named by what is done with it."""
    uses = {use.parameter: use for use in discover(*block_of("gpt2", **GPT2)).linears}
    assert uses["attn.c_attn.weight"] == LinearUse("attn.c_attn.weight", 0, 1)
    uses = {use.parameter: use for use in discover(*block_of("mixtral", **MIXTRAL)).linears}
    assert uses["mlp.gate.weight"].role == "router"
    assert uses["mlp.experts.down_proj"] == LinearUse("mlp.experts.down_proj", 2, 1, 0)
    assert {use.role for use in uses.values()} == {"linear", "router"}
    others = discover(*block_of("mamba", **MAMBA)).others
    assert others == {"mixer.A_log": "state-space matrix", "mixer.conv1d.weight": "conv"}


class Branch(nn.Module):
    """`down(between(up(norm(x))))` with a residual, and something else besides."""

    def __init__(self, between: Callable[[Tensor], Tensor], extra: Callable[["Branch", Tensor], Tensor] | None = None):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.between, self.extra = between, extra

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        result = x + self.down(self.between(self.up(normed)))
        return result if self.extra is None else result + self.extra(self, normed)


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], int | None]] = {
    "nothing": (lambda x: x, 1),
    "relu": (F.relu, 1),
    "relu by hand": (lambda x: x * (x > 0), 1),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), 1),
    "squared": (lambda x: F.relu(x).square(), 2),
    "in place": (lambda x: x.clone().relu_().mul_(2), 1),
    "gelu": (F.gelu, None),
    "clamp that no activation reaches": (lambda x: x.clamp(-50, 50), None),
    "relu6": (F.relu6, None),
    "softmax": (lambda x: x.softmax(-1), None),
    "sorted": (lambda x: x.sort(-1).values, None),
    "shifted relu": (lambda x: F.relu(x - 0.1), None),
    "quantized": (lambda x: (x * 8).round() / 8, None),
    "by the value": (lambda x: x * float(x.max()), None),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_may_stand_between_two_linears(name: str) -> None:
    """Only what keeps a positive scale of every channel, whatever its size."""
    between, power = BETWEEN[name]
    structure = discover(*randomized(Branch(between)))
    assert "norm.weight" in summary(structure)
    edits = {"up.weight": "0: -1", "up.bias": "0: -1", "down.weight": f"1: {power or 0:+d}"}
    assert summary(structure).get("up.weight") == (None if power is None else (24, edits))
    assert ("up.weight" in refusals(structure)) == (power is None)


def test_channels_that_are_dead_in_the_trace() -> None:
    """A ReLU is known to keep scales even where it lets nothing through; what a mask hides is left out, not guessed."""
    for between, dead in ((F.relu, 0), (lambda x: x * (x > 0), 2)):
        block, args, kwargs = randomized(Branch(between))
        block.up.bias.data[:2] = -100
        (group,) = (group for group in discover(block, args, kwargs).groups if group.name == "up.weight")
        for edit in (*group.producers, *group.consumers):
            assert edit.channels == (*(-1,) * dead, *range(24 - dead))


class TwoReaders(nn.Module):
    """Rows that one linear reads through a mask, and another as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.masked, self.whole = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.up(x)
        return x + self.masked(rows * (rows > 0)) + self.whole(rows)


def test_a_channel_that_one_reader_never_saw_is_left_out_everywhere() -> None:
    """The trace can't tell which column of `masked` reads a dead row, and its proof would not miss it."""
    block, args, kwargs = randomized(TwoReaders())
    block.up.bias.data[3] = -100
    (group,) = discover(block, args, kwargs).groups
    assert {edit.parameter for edit in group.consumers} == {"masked.weight", "whole.weight"}
    for edit in (*group.producers, *group.consumers):
        assert edit.channels == (0, 1, 2, -1, *range(3, 23))


class Delayed(nn.Module):
    """A linear layer that also runs once on the zeros before the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.late = nn.RMSNorm(16), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        start = self.late(normed.new_zeros(len(x), 1, 16))
        return x + torch.cat([start, self.late(normed)[:, :-1]], 1)


def test_zeros_have_every_scale() -> None:
    structure = discover(*randomized(Delayed()))
    assert summary(structure) == {"norm.weight": (16, {"norm.weight": "0: -1", **rows("late")})}
    assert structure.linears == (LinearUse("late.weight", 1, 0),)


EXTRA: dict[str, tuple[Callable[[Branch, Tensor], Tensor], str]] = {
    "residual": (lambda block, normed: normed, "residual stream"),
    "gain read again": (lambda block, normed: block.norm.weight.expand_as(normed), "add"),
    "consumer read elsewhere": (
        lambda block, normed: F.linear(torch.ones_like(normed), block.up.weight)[..., :16],
        "up.weight is multiplied with something else as well",
    ),
    "scores": (lambda block, normed: (normed @ normed.mT).softmax(-1) @ normed.detach(), "attention scores"),
    "softmax": (lambda block, normed: normed.softmax(-1), "softmax"),
}


@pytest.mark.parametrize("name", EXTRA)
def test_what_forbids_a_norm(name: str) -> None:
    extra, reason = EXTRA[name]
    structure = discover(*randomized(Branch(F.gelu, extra)))
    assert structure.groups == ()
    assert reason in refusals(structure)["norm.weight"]


class Shared(nn.Module):
    """A norm whose gain is used twice, with 1 added and with something else."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.gain, self.added = nn.Parameter(torch.zeros(16)), added
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (16,))
        gain = self.gain + self.added if self.added else self.gain
        return x + self.one(normed * (1 + self.gain)) + self.other(normed * gain)


def test_a_gain_that_is_used_twice() -> None:
    """Uses with one offset fold together; with two offsets they cannot."""
    assert summary(discover(*randomized(Shared(1)))) == {"gain": (16, {"gain": PLUS_ONE, **rows("one", "other")})}
    for added in (0, 0.5):
        structure = discover(*randomized(Shared(added)))
        assert structure.groups == ()
        assert "gain is read by" in refusals(structure)["gain"]


class ModuleExperts(nn.Module):
    """Experts as a list of modules; tokens go only to the first `used` of them."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.norm, self.used = nn.RMSNorm(16), used
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 8), "down": nn.Linear(8, 16)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        for expert in list(self.experts)[: self.used]:
            x = x + expert["down"](F.relu(expert["up"](normed)))
        return x


def test_experts_without_a_token_forbid_the_norm_but_not_each_other() -> None:
    assert len(discover(*randomized(ModuleExperts(3))).groups) == 4
    structure = discover(*randomized(ModuleExperts(2)))
    assert set(summary(structure)) == {"experts.0.up.weight", "experts.1.up.weight"}
    assert refusals(structure)["norm.weight"].startswith("experts.2.up.weight wasn't used")
    assert structure.others["experts.2.up.weight"] == "not used in this pass"


class Handed(nn.Module):
    """Its values go to other blocks too, through a dictionary among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        shared["values"] = self.values(x)
        return x + self.out(shared["values"])


def test_what_other_blocks_read_is_refused() -> None:
    block, args, _ = randomized(Handed())
    shared: dict[str, Tensor] = {}
    structure = discover(block, args, {"shared": shared})
    assert refusals(structure)["values.weight"] == "its output is handed on to other blocks"
    assert shared == {}


def test_the_block_and_its_arguments_stay_as_they_are_and_a_seed_decides() -> None:
    block, args, kwargs = odd_block()
    before, hidden = copy.deepcopy(block.state_dict()), args[0].clone()
    one, other = discover(block, args, kwargs, seed=3), discover(block, args, kwargs, seed=3)
    assert one == other
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert torch.equal(args[0], hidden)


def test_without_groups() -> None:
    call = odd_block()
    full, short = discover(*call), discover(*call, groups=False)
    assert (short.groups, short.refusals) == ((), ())
    assert (short.linears, short.others) == (full.linears, full.others)


def test_a_wrong_group_fails_its_proof() -> None:
    """The consumer of one group with the producer of another; and one channel of 24 with another's scale."""
    block, args, kwargs = call = randomized(Branch(F.relu))
    (up,) = (group for group in discover(*call).groups if group.name == "up.weight")
    bound = rounding_bound(record(block, [(args, kwargs)]))
    prover = Prover(block, [(args, kwargs)], bound, torch.Generator().manual_seed(0))
    assert prover.error([up]) <= bound
    consumer = up.consumers[0]
    swapped = Edit(consumer.parameter, consumer.axis, (1, 1, *consumer.channels[2:]), consumer.power)
    assert prover.error([Group(up.name, up.kind, up.channels, up.producers, (swapped,))]) > 20 * bound


def test_blocks_that_cannot_be_traced() -> None:
    block, args, kwargs = odd_block()
    with pytest.raises(DiscoveryError, match=r"OddBlock is in training mode.*block.eval\(\)"):
        discover(copy.deepcopy(block).train(), args, kwargs)
    with pytest.raises(DiscoveryError, match=r"alpha.flair has no memory"):
        discover(copy.deepcopy(block).to("meta"), args, kwargs)
    with pytest.raises(DiscoveryError, match=r"alpha.flair has torch.bfloat16.*float32"):
        discover(copy.deepcopy(block).bfloat16(), args, kwargs)
    broken = copy.deepcopy(block)
    broken.alpha.flair.data.fill_(math.nan)
    with pytest.raises(DiscoveryError, match="no finite output"):
        discover(broken, args, kwargs)
    with pytest.raises(DiscoveryError, match="hidden states"):
        discover(nn.Identity().eval(), (), {"ids": torch.arange(3)})
