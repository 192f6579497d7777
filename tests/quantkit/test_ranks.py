"""What ranks share, without any other rank: the environment, units of work, samples and sums of streams."""

import json
import math

import models
import pytest
import torch
from quantkit_calibration.activity import Distribution, Zeros
from quantkit_calibration.observers import ChannelAbsmax, Reservoir, TensorRange

from quantkit import quantize, shards
from quantkit.checkpoint import Hub
from quantkit.errors import QuantkitError
from quantkit.interruption import Interruptible, cache_folder
from quantkit.journal import Journal
from quantkit.launched import Launched, is_silent, launched
from quantkit.pipeline import open_source
from quantkit.planning import make_plan
from quantkit.ranks import ALONE, current
from quantkit.recipe import Recipe
from quantkit.reducing import Turn, absmaxima, merged, ranges, sample, total
from quantkit.units import units

WHERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, Launched()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Launched()),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **WHERE}, Launched(3, 4, 1, 2)),
    ],
)
def test_where_a_process_stands(monkeypatch, values, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *WHERE):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert launched() == place
    assert is_silent() == (place.rank > 0)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **WHERE}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is no number of processes"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', which is no number of processes"),
    ],
)
def test_an_environment_that_is_half_set(monkeypatch, values, told):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *WHERE):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(QuantkitError, match=told):
        launched()


def test_a_process_alone_exchanges_nothing():
    assert current() is ALONE
    tensor = torch.tensor([1.0, math.nan])
    assert ALONE.gather("a") == ["a"]
    assert ALONE.told("a") == "a"
    assert ALONE.sum(tensor) is tensor
    assert ALONE.largest(tensor) is tensor
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.decided(lambda: 2.0)() == 2.0
    ALONE.barrier()
    ALONE.agree("thing", 1)


@pytest.mark.parametrize("largest", [21_000, 40_000, 400_000])
@pytest.mark.parametrize("steps", [["w8a8"], ["int4:group=channel"], ["sparse24:criterion=magnitude", "int8"]])
@pytest.mark.parametrize("name", ["llama_unused", "mixtral", "gpt2"])
def test_units_end_where_one_process_has_nothing_left_to_write(tmp_path, monkeypatch, name, steps, largest):
    """By the records that it really writes."""
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 20_000)
    folder = getattr(models, name)(tmp_path / "model")
    written = []
    put = Journal._write

    def noted(self):
        written.append(tuple(self._pending))
        put(self)

    monkeypatch.setattr(Journal, "_write", noted)
    quantize(folder, tmp_path / "out", steps=steps, max_shard_size=largest, progress=False)
    source = open_source(folder, Hub(), None, dequantize=False)
    plan = make_plan(source, Recipe.of(steps))
    found = units(plan, source, plan.stages, largest, min(20_000, largest))
    assert [tuple(stage.name for stage in unit) for unit in found] == written


class Several:
    """Ranks in one process: what each gives is known beforehand, in the order of the exchanges."""

    def __init__(self, others):
        self.others, self.is_alone = others, False

    def gather(self, value):
        return [value, *self.others.pop(0)]

    def largest(self, tensor):
        return torch.maximum(tensor, self.others.pop(0))

    def sum(self, tensor):
        tensor += self.others.pop(0)
        return tensor


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("is_expert", [False, True])
def test_a_sample_is_that_of_one_process(ranks, is_expert):
    """Batches of a stream go to ranks in turn; an expert's are of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [7 + 5 * (number % 3) if is_expert else 12 for number in range(11)]
    batches = [torch.randn(length, 4, generator=generator) for length in lengths]

    def run(numbers):
        made = Reservoir(10, torch.Generator().manual_seed(3))
        for number in numbers:
            Turn(number, 3 * number, 3).begin(made, len(batches[number]), 3, is_expert)
            made.update(batches[number])
        return made

    whole = run(range(11))
    if not is_expert:  # as it is without turns
        plain = Reservoir(10, torch.Generator().manual_seed(3))
        for batch in batches:
            plain.update(batch)
        assert torch.equal(plain.result(), whole.result())
    parts = [run(range(rank, 11, ranks)) for rank in range(ranks)]
    chosen = [part.choose([each.drawn() for each in parts]) for part in parts]
    rows = sum(
        part.rows(own, 4, torch.float32, torch.device("cpu")) for part, (_, _, own) in zip(parts, chosen, strict=True)
    )
    assert torch.equal(rows, whole.result())
    assert torch.equal(chosen[0][0], whole.drawn()[0])
    if ranks == 2:
        one, other = parts
        shape = (4, torch.float32)
        told = [[(other.drawn(), shape, other.seen)], other.rows(chosen[1][2], *shape, torch.device("cpu"))]
        sample(one, Several(told), torch.device("cpu"))
        assert torch.equal(one.result(), whole.result())
        assert one.seen == whole.seen


def test_maxima_are_those_of_all_and_nan_is_kept():
    one, other = ChannelAbsmax(), ChannelAbsmax()
    one.update(torch.tensor([[1.0, -2.0, 0.0]]))
    other.update(torch.tensor([[3.0, math.nan, -0.5]]))
    own = {("q", None): one}
    told = [[{("e", 1): 2, ("q", None): 3}], torch.cat([torch.tensor([5.0, 6.0]), other.result()])]
    found = absmaxima(own, Several(told), torch.device("cpu"))
    assert found["e", 1].result().tolist() == [5.0, 6.0]
    largest = found["q", None].result()
    assert largest[0] == 3.0
    assert math.isnan(largest[1])
    assert largest[2] == 0.5


def test_counts_and_ranges_are_those_of_all():
    x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0)).relu()
    for made in (Distribution, lambda: Zeros(8)):
        whole, one, other, third = made(), made(), made(), made()
        for statistic, part in ((whole, x), (one, x[:1]), (other, x[1:3]), (third, x[3:])):
            statistic.update(part)
        found = merged({"up": one}, Several([[{"up": other}, {"up": third, "gate": whole}]]))
        if isinstance(whole, Zeros):
            assert found["up"].result() == whole.result()
            assert found["up"].tokens == whole.tokens
        else:
            assert found["up"].quantile(0.7) == whole.quantile(0.7)
        assert set(found) == {"up", "gate"}
    whole, one, other = TensorRange(), TensorRange(), TensorRange()
    whole.update(x)
    one.update(x[:1])
    other.update(x[1:])
    absmax, single, counts = other.parts()
    ranges({"up": one}, Several([[(absmax, single)], counts]))
    assert one.result() == whole.result()
    assert one.range("percentile") == whole.range("percentile")
    assert total({"a": 1}, Several([[{"a": 2, "b": 3}]])) == {"a": 3, "b": 3}


class Count:
    """A statistic that counts."""

    def __init__(self):
        self.value = 0

    def state(self):
        return {"value": torch.tensor(self.value)}

    def take_up(self, state):
        self.value = int(state["value"])

    def merge(self, state):
        self.value += int(state["value"])


def test_an_evaluation_goes_on_with_as_many_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    count = Count()
    kept = Interruptible({"a": 1}, {"count": count}, ranks=(1, 2))
    count.value = 5
    kept.done()
    kept.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert len(list(cache_folder().iterdir())) == 1
    with pytest.raises(QuantkitError, match="was stopped with 2 processes, and now there are 1"):
        Interruptible({"a": 1}, {"count": Count()})
    again = Count()
    assert Interruptible({"a": 1}, {"count": again}, ranks=(1, 2)).count == 1
    assert again.value == 5
    Interruptible({"a": 1}, {"count": Count()}, restart=True)
    assert not list(cache_folder().iterdir())


def test_the_plan_says_what_each_of_several_processes_takes(cli, model_folder, tmp_path):
    words = ("plan", model_folder(), "-m", "smoothquant", "-m", "w8a8", "--samples", "64", "--seq-len", "64", "--json")
    one, four = (json.loads(cli(*words, "--ranks", count).stdout)["budget"] for count in ("1", "4"))
    states = [each["memory"]["parts"]["hidden states"] for each in (one, four)]
    # 64 windows make batches of 1, 8 times 7 and 7: 9, of which a rank has 3 at most; one more is on its way
    assert states[0] / states[1] == (9 + 1) / (3 + 1)
    assert "(4,096 tokens x" in one["time"]["formula"]
    assert "(1,024 tokens x" in four["time"]["formula"]
    assert "each of 4 processes" in four["time"]["assumption"]
