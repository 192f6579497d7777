"""SmoothQuant on real blocks: the paper's scale, folds that lose nothing in the stored dtype, and those undone."""

from dataclasses import replace

import pytest
import torch
from real_blocks import EXPECTED, block_of
from schemes import SCHEMES

from quantkit import formats
from quantkit.discovery import discover
from quantkit.modules import QuantizedLinear, quantize_linear
from quantkit.scheme import Scheme
from quantkit.smoothing import LARGEST_SCALE, Inputs, Proof, Smoother, quantized_product, smoothing_scale
from quantkit.watching import Watch

W8A8 = Scheme("int8", activation_dtype="int8")


class Work:
    """A real block with outliers in its activations, what it does, and what was observed of it."""

    def __init__(self, name, dtype=torch.float32, keep_rows=False, quantized=None):
        where, changes, _ = EXPECTED[name]
        self.block, self.args, self.kwargs = block_of(*where, **changes)
        for parameter in self.block.parameters():
            parameter.data = parameter.to(dtype).float()
        self.groups = {group.name: group for group in discover(self.block, self.args, self.kwargs).groups}
        for group_name in self.groups:  # gains that are far apart, so that some channels are outliers
            gain = self.block.get_parameter(group_name)
            if gain.ndim == 1:
                gain.data = (gain * torch.logspace(-1, 1, len(gain))).to(dtype).float()
        consumers = {edit.parameter: edit.axis for group in self.groups.values() for edit in group.consumers}
        self.quantized = set(consumers) if quantized is None else quantized
        self.dtypes = dict.fromkeys(dict(self.block.named_parameters()), dtype)
        self.inputs = Inputs(keep_rows, seed=0)
        watched = {path: (self.block.get_parameter(path), axis) for path, axis in consumers.items()}
        with torch.no_grad(), Watch(watched, self.inputs.see):
            self.block(*self.args, **self.kwargs)
        self.before = {path: value.detach().clone() for path, value in self.block.named_parameters()}

    def output(self):
        with torch.no_grad():
            output = self.block(*self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def smoother(self, alpha=0.5, scheme=W8A8):
        proof = Proof(self.output, self.block.parameters())
        return Smoother("block", self.block, alpha, scheme, self.quantized, self.dtypes, proof)

    def now(self, name):
        return self.block.get_parameter(name).detach()

    def changed(self):
        return {name for name, value in self.before.items() if not torch.equal(value, self.now(name))}


def edited(group):
    return {edit.parameter for edit in (*group.producers, *group.consumers)}


class TestScale:
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
    def test_equation_4(self, alpha):
        """Of arXiv:2211.10438, as a loop in float64; two powers and a quotient in float32 are right to 4 ulp."""
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.rand(50, generator=generator) * 10 + 0.01 for _ in range(2))
        found = smoothing_scale(x, w, alpha)
        for j in range(50):
            expected = float(x[j]) ** alpha / float(w[j]) ** (1 - alpha)
            assert float(found[j]) == pytest.approx(expected, rel=4 * 2**-23)

    def test_channels_that_carry_or_feed_nothing_stay(self):
        x = torch.tensor([0.0, 1.0, 0.0, float("inf"), float("nan"), 4.0])
        w = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
        assert smoothing_scale(x, w, 0.5).tolist() == [1, 1, 1, 1, 1, 2]

    def test_extremes_are_bounded(self):
        found = smoothing_scale(torch.tensor([1e30, 1e-30]), torch.tensor([1e-30, 1e30]), 0.5)
        torch.testing.assert_close(found, torch.tensor([LARGEST_SCALE, 1 / LARGEST_SCALE]))

    @pytest.mark.parametrize(
        ("block", "name"),
        [
            ("llama", "input_layernorm.weight"),
            ("llama", "self_attn.v_proj.weight"),  # channels that two query heads share
            ("gpt2", "ln_2.weight"),  # weights in x out
            ("mixtral", "post_attention_layernorm.weight"),  # a router beside experts
            ("mixtral", "mlp.experts.gate_up_proj"),
        ],
    )
    def test_a_group_is_folded_by_the_scale_of_all_that_it_feeds(self, block, name):
        """The largest of all positions, weights and experts for a channel, as a loop; each consumer gets s times."""
        work = Work(block)
        group = work.groups[name]
        top_x, top_w = [0.0] * group.channels, [0.0] * group.channels
        for edit in group.consumers:
            weight = work.before[edit.parameter].movedim(edit.axis, -1).reshape(-1, len(edit.channels))
            seen = [value.result() for (path, _), value in work.inputs.absmax.items() if path == edit.parameter]
            for position, channel in enumerate(edit.channels):
                if channel >= 0:
                    top_w[channel] = max(top_w[channel], float(weight[:, position].abs().max()))
                    top_x[channel] = max(top_x[channel], *(float(each[position]) for each in seen))
        report = work.smoother().fold(group, work.inputs)
        assert report.state == "folded", report
        for edit in group.consumers:
            before, after = (
                value.movedim(edit.axis, -1) for value in (work.before[edit.parameter], work.now(edit.parameter))
            )
            for position, channel in enumerate(edit.channels):
                s = (top_x[channel] / top_w[channel]) ** 0.5 if channel >= 0 else 1.0
                ratio = after[..., position] / before[..., position]
                torch.testing.assert_close(ratio, torch.full_like(ratio, s), rtol=16 * 2**-23, atol=0)

    def test_what_is_not_quantized_is_multiplied_and_not_asked(self):
        """Of q, k and v only q is quantized: its weights alone make the scale."""
        work = Work("llama", quantized={"self_attn.q_proj.weight"})
        group = work.groups["input_layernorm.weight"]
        work.smoother().fold(group, work.inputs)
        weight, x = work.before["self_attn.q_proj.weight"], work.inputs.largest("self_attn.q_proj.weight")
        expected = smoothing_scale(x, weight.abs().amax(0), 0.5)
        for leaf in "qkv":
            name = f"self_attn.{leaf}_proj.weight"
            torch.testing.assert_close(work.now(name) / work.before[name], expected.expand_as(work.now(name)))


class TestFolds:
    @pytest.mark.parametrize(
        "name", ["llama", "gemma", "gpt2", "opt", "phi3", "falcon", "mixtral", "nemotron", "bamba"]
    )
    def test_every_group_keeps_the_blocks_output(self, name):
        """By the proof's own measure, and as a whole; and just the parameters that the groups name are changed."""
        work = Work(name)
        before = work.output()
        smoother = work.smoother()
        reports = [smoother.fold(group, work.inputs) for group in work.groups.values()]
        assert {report.state for report in reports} == {"folded"}
        assert all(0 <= report.error <= 1 and report.alpha == 0.5 for report in reports)
        expected = set().union(*map(edited, work.groups.values()))
        assert smoother.changed == expected
        assert work.changed() == expected
        after = work.output()
        assert float((after - before).norm() / before.norm()) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "nemotron"])
    def test_a_gain_loses_nothing_when_it_is_stored(self, name, dtype):
        """The gain as it is written times what the consumers were multiplied by is the gain that was there.

        To two roundings of float32, where a gain / s that is rounded to the dtype is off by 2**-9 or 2**-11. Gemma's
        and Nemotron's norms multiply by 1 + weight.
        """
        work = Work(name, dtype)
        smoother = work.smoother()
        for group in [group for group in work.groups.values() if group.kind == "norm"]:
            assert smoother.fold(group, work.inputs).state == "folded"
            gain, consumer = group.producers[0], group.consumers[0]
            old, new = work.before[gain.parameter] + gain.offset, work.now(gain.parameter)
            stored = new.to(dtype).float()
            weights = (work.before[consumer.parameter], work.now(consumer.parameter))
            before, after = (value.movedim(consumer.axis, -1).reshape(-1, len(consumer.channels)) for value in weights)
            s = (after.double() / before.double()).median(0).values
            assert float(s.max() / s.min()) > 1.5
            restored = (stored + gain.offset).double() * s[torch.tensor(gain.channels)]
            assert float(((restored - old) / old).abs().max()) < 4 * 2**-24

    def test_behind_a_squared_relu_the_producer_is_divided_by_the_root(self):
        """Nemotron: relu(x / r)**2 * r**2 = relu(x)**2, where r**2 is equation 4's scale of what down_proj meets."""
        work = Work("nemotron")
        group = work.groups["mlp.up_proj.weight"]
        assert [edit.power for edit in group.consumers] == [2]
        down, up = "mlp.down_proj.weight", "mlp.up_proj.weight"
        scale = smoothing_scale(work.inputs.largest(down), work.before[down].abs().amax(0), 0.5)
        report = work.smoother().fold(group, work.inputs)
        assert report.state == "folded"
        torch.testing.assert_close(work.now(down), work.before[down] * scale, rtol=8 * 2**-23, atol=0)
        torch.testing.assert_close(work.now(up), work.before[up] / scale.sqrt()[:, None], rtol=8 * 2**-23, atol=0)

    @pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mixtral", "nemotron"])
    def test_a_wrong_group_is_undone(self, name):
        """With any of its edits forgotten, or made twice: told with the error, and every bit is as it was."""
        work = Work(name)
        for group in work.groups.values():
            wrong = []
            for side in ("producers", "consumers"):
                edits = getattr(group, side)
                for number, edit in enumerate(edits):
                    rest = (*edits[:number], *edits[number + 1 :])
                    wrong.append(replace(group, **{side: (*edits, edit)}))
                    if rest and not (side == "producers" and number == 0):
                        wrong.append(replace(group, **{side: rest}))
            for each in wrong:
                smoother = work.smoother()
                report = smoother.fold(each, work.inputs)
                assert report.state == "undone", each
                assert report.error > 1
                assert "more than rounding" in report.reason
                assert smoother.changed == set()
                assert work.changed() == set()

    def test_a_proof_that_cannot_be_made_is_none(self):
        work = Work("llama")
        smoother = Smoother("block", work.block, 0.5, W8A8, work.quantized, work.dtypes, lambda: float("nan"))
        assert smoother.fold(work.groups["input_layernorm.weight"], work.inputs).state == "undone"
        assert work.changed() == set()

    def test_nothing_that_is_quantized(self):
        work = Work("llama", quantized={"mlp.down_proj.weight"})
        report = work.smoother().fold(work.groups["input_layernorm.weight"], work.inputs)
        assert (report.state, report.reason) == ("skipped", "nothing that it feeds is quantized")
        assert (report.block, report.producer, report.kind) == ("block", "input_layernorm.weight", "norm")
        assert sorted(report.consumers) == [f"self_attn.{leaf}_proj.weight" for leaf in "kqv"]
        assert work.changed() == set()

    def test_nothing_that_was_seen(self):
        work = Work("llama")
        report = work.smoother().fold(work.groups["input_layernorm.weight"], Inputs(keep_rows=False, seed=0))
        assert (report.state, report.reason) == ("skipped", "what it feeds met no calibration token")
        assert work.changed() == set()


class TestFoldsTogether:
    """All groups of a block, proven in one run."""

    def restored(self, work, smoother):
        def restore():
            work.block.load_state_dict(work.before, assign=True)

        smoother.restore = restore
        return smoother

    def runs(self, smoother):
        prove, made = smoother.prove, []
        smoother.prove = lambda: made.append(prove()) or made[-1]
        return made

    @pytest.mark.parametrize("alpha", [0.5, None])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_give_the_weights_that_one_after_another_gives(self, name, alpha):
        """Bit for bit, for one proof instead of one a group."""
        together, apart = (Work(name, torch.bfloat16, keep_rows=True) for _ in range(2))
        smoother, other = self.restored(together, together.smoother(alpha)), apart.smoother(alpha)
        proofs, others = self.runs(smoother), self.runs(other)
        found = smoother.fold_all(list(together.groups.values()), together.inputs)
        expected = [other.fold(group, apart.inputs) for group in apart.groups.values()]
        assert (len(proofs), len(others)) == (1, sum(report.state == "folded" for report in expected))
        assert len(others) > 2
        assert [replace(report, error=None) for report in found] == [replace(each, error=None) for each in expected]
        assert {report.error for report in found if report.state == "folded"} == {proofs[0]}
        assert smoother.changed == other.changed == together.changed()
        for path in together.before:
            assert torch.equal(together.now(path), apart.now(path)), path

    def test_where_one_fails_each_is_proven_alone(self):
        """The others are folded as if it weren't there."""
        work, apart = Work("llama"), Work("llama")
        name = "input_layernorm.weight"
        work.groups[name] = replace(work.groups[name], consumers=work.groups[name].consumers[1:])
        smoother, other = self.restored(work, work.smoother()), apart.smoother()
        proofs = self.runs(smoother)
        found = {report.producer: report for report in smoother.fold_all(list(work.groups.values()), work.inputs)}
        assert len(proofs) == 1 + len(work.groups)
        assert found[name].state == "undone"
        assert found[name].error > 1
        for group_name, group in apart.groups.items():
            if group_name != name:
                assert other.fold(group, apart.inputs) == found[group_name]
        assert smoother.changed == other.changed == work.changed()
        assert all(torch.equal(work.now(path), apart.now(path)) for path in work.before)

    def test_nothing_folded_needs_no_proof(self):
        work = Work("llama", quantized=set())
        smoother = self.restored(work, work.smoother())
        proofs = self.runs(smoother)
        assert {each.state for each in smoother.fold_all(list(work.groups.values()), work.inputs)} == {"skipped"}
        assert proofs == []

    def test_without_a_way_back_each_is_proven_as_it_is_folded(self):
        work = Work("llama")
        smoother = work.smoother()
        proofs = self.runs(smoother)
        smoother.fold_all(list(work.groups.values()), work.inputs)
        assert len(proofs) == len(work.groups)


def loss(x, weight, s):
    """The squared error of W8A8 under a scale: one scale a token and a row, largest code 127, in plain steps."""

    def rounded(values):
        step = values.abs().amax(-1, keepdim=True) / 127
        return (values / step).round() * step

    return float((x @ weight.t() - rounded(x / s) @ rounded(weight * s).t()).double().square().sum())


class TestSearch:
    @pytest.mark.parametrize("name", ["input_layernorm.weight", "mlp.up_proj.weight", "self_attn.v_proj.weight"])
    def test_the_chosen_strength_is_the_best_of_all(self, name):
        """No worse than no smoothing, than 0.5 or any other step, by a loss of our own."""
        work = Work("llama", keep_rows=True)
        group = work.groups[name]
        report = work.smoother(alpha=None).fold(group, work.inputs)
        assert report.state == "folded"
        losses = {}
        for alpha in [None, *(step / 20 for step in range(21))]:
            losses[alpha] = 0.0
            for edit in group.consumers:
                ((_, x),) = work.inputs.samples(edit.parameter)
                channels = torch.tensor(edit.channels)
                s = torch.ones(len(channels)) if alpha is None else self.scale(work, group, alpha)[channels]
                losses[alpha] += loss(x, work.before[edit.parameter], s)
        assert losses[report.alpha] <= min(losses.values()) * 1.001  # a tie that rounds the other way
        assert losses[report.alpha] < losses[None]

    def scale(self, work, group, alpha):
        tops = torch.zeros(2, group.channels)
        for edit in group.consumers:
            x, w = work.inputs.largest(edit.parameter), work.before[edit.parameter].abs().amax(0)
            for position, channel in enumerate(edit.channels):
                tops[0, channel] = torch.maximum(tops[0, channel], x[position])
                tops[1, channel] = torch.maximum(tops[1, channel], w[position])
        return smoothing_scale(*tops, alpha)

    def test_what_needs_no_smoothing_is_kept(self):
        """Activations and weights of 1 and -1 lose nothing in 8 bits."""
        work = Work("llama", keep_rows=True)
        inputs = Inputs(keep_rows=True, seed=0)
        signs = torch.randint(0, 2, (20, 32), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        for leaf in "qkv":
            name = f"self_attn.{leaf}_proj.weight"
            weight = work.block.get_parameter(name)
            weight.data = signs[:1].expand_as(weight).contiguous()
            work.before[name] = weight.detach().clone()
            inputs.see(name, None, signs)
        report = work.smoother(alpha=None).fold(work.groups["input_layernorm.weight"], inputs)
        assert (report.state, report.alpha) == ("kept", None)
        assert work.changed() == set()

    @pytest.mark.parametrize("name", ["mixtral", "nemotron", "gpt2"])
    def test_experts_roots_and_in_x_out_weights_are_searched_too(self, name):
        work = Work(name, keep_rows=True)
        smoother = work.smoother(alpha=None)
        reports = [smoother.fold(group, work.inputs) for group in work.groups.values()]
        assert {report.state for report in reports} <= {"folded", "kept"}
        assert any(report.state == "folded" for report in reports)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_searchs_product_is_that_of_the_quantized_layer(name):
    """But for static scales, which it takes from the activations at hand, and LLM.int8's outliers (none here).

    Both sum 256 products of the same rounded numbers in float32: off by 256 * 2**-24 of the sum of magnitudes at most.
    """
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(128, 256, generator=generator), torch.randn(6, 256, generator=generator)
    layout = formats.choose(scheme)
    layer = QuantizedLinear(256, 128, scheme, layout, bias=False, dtype=torch.float32)
    codes, scale = quantize_linear(weight, scheme)
    top = {"int8": 127, "float8_e4m3fn": 448, "float8_e5m2": 57344}[scheme.code_dtype]
    static = (x.abs().max() / top).reshape(1) if scheme.is_static else None
    for leaf, value in layout.compress(scheme, codes, scale, static).items():
        layer._buffers[leaf] = value
    bound = 2 * 256 * 2**-24 * 1.1 * (x.abs() @ weight.abs().t())
    assert bool(((quantized_product(x, weight, scheme) - layer(x)).abs() <= bound).all())


class TestProof:
    def test_no_change_is_none_and_rounding_is_less_than_one(self):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
        changes = iter([x, x, x * (1 + 2**-22), x * 1.001, x * float("nan")])
        proof = Proof(lambda: next(changes), [torch.ones(16, 16)])
        assert proof() == 0
        assert 0 < proof() < 1
        assert proof() > 1
        assert proof() == float("inf")

    def test_a_single_feature_is_enough(self):
        """A feature of small numbers has a bound of its own, but for the root mean square of all."""
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
        other = x.clone()
        other[:, 3] *= 1.01
        changes = iter([x, other])
        assert Proof(lambda: next(changes), [torch.ones(16, 16)])() > 1

    def test_more_and_longer_products_may_round_more(self):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))

        def ratio(*weights):
            changes = iter([x, x * (1 + 2**-20)])
            return Proof(lambda: next(changes), weights)()

        one = ratio(torch.ones(16, 16))
        assert ratio(torch.ones(16, 16), torch.ones(16), torch.ones(4, 64)) == pytest.approx(one * 2 / 3 / 2, rel=1e-5)


class TestInputs:
    def test_largest_is_over_all_calls_and_experts(self):
        inputs = Inputs(keep_rows=False, seed=0)
        parts = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        for expert, part in zip([None, 0, 1, 1], parts, strict=True):
            inputs.see("a" if expert is None else "b", expert, part)
        inputs.see("b", 2, torch.zeros(0, 4))
        assert torch.equal(inputs.largest("a"), parts[0].abs().amax((0, 1)))
        assert torch.equal(inputs.largest("b"), torch.stack(parts[1:]).abs().amax((0, 1, 2)))
        assert inputs.largest("c") is None
        assert inputs.tokens == {("a", None): 6, ("b", 0): 6, ("b", 1): 12}
        assert inputs.samples("b") == []

    def test_samples_are_rows_that_were_seen_those_of_most_tokens_first(self):
        inputs = Inputs(keep_rows=True, seed=0)
        for expert in range(12):
            inputs.see("p", expert, torch.full((expert + 1, 3), float(expert)))
        samples = inputs.samples("p")
        assert [expert for expert, _ in samples] == list(range(11, 3, -1))
        assert all(torch.equal(rows, torch.full((expert + 1, 3), float(expert))) for expert, rows in samples)
        many = torch.arange(3000.0).view(1000, 3)
        one, two = Inputs(keep_rows=True, seed=0), Inputs(keep_rows=True, seed=0)
        one.see("p", None, many)
        for part in many.split(300):
            two.see("p", None, part)
        ((_, rows),) = one.samples("p")
        assert len(rows) == 512
        assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in many.tolist()}
        assert torch.equal(two.samples("p")[0][1], rows)
