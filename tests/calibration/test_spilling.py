"""Tensors that wait on disk come back bit by bit, and runs with them are those without."""

import pytest
import torch
from quantkit_calibration import spilling
from quantkit_calibration.sequential import run_blocks
from quantkit_calibration.spilling import Spill
from torch import nn


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    monkeypatch.setattr(spilling, "SMALLEST", 1)
    monkeypatch.setattr(spilling, "PIECE", 1000)


def held(*tensors):
    return [tensor.untyped_storage().nbytes() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_comes_back_is_what_went(tmp_path, dtype):
    with torch.no_grad():
        one = torch.randn(300, 40).mul(3).to(dtype)
        view, other = one.t()[3:], torch.randn(7, 5)
        kept, kept_other = one.clone(), other.clone()
        spill = Spill(tmp_path)
        parcel = spill.put(((one, view), {"mask": [other], "flag": True, "none": None}))
        assert held(one, view, other) == [0, 0, 0]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == kept.nbytes + kept_other.nbytes
        spill.back(parcel)
        assert torch.equal(one, kept)
        assert torch.equal(view, kept.t()[3:])
        assert torch.equal(other, kept_other)


def test_what_was_changed_in_place_is_written_again(tmp_path):
    with torch.no_grad():
        one = torch.randn(100)
        kept, spill = one.clone(), Spill(tmp_path)
        parcel = spill.put([one])
        spill.back(parcel)
        one[:50] += 1
        spill.away(parcel)
        assert held(one) == [0]
        spill.back(parcel)
        assert torch.equal(one[50:], kept[50:])
        assert torch.equal(one[:50], kept[:50] + 1)


def test_parameters_and_what_is_exempt_stay(tmp_path):
    buffer, parameter = torch.randn(100), nn.Parameter(torch.randn(100))
    Spill(tmp_path, exempt=[buffer]).put([buffer[10:], parameter])
    assert held(buffer, parameter) == [400, 400]


def test_files_are_used_again(tmp_path):
    spill = Spill(tmp_path)
    for _ in range(5):
        tensor = torch.randn(100)
        spill.drop(spill.put([tensor]))
    assert len(list(tmp_path.iterdir())) == 1


class Model(nn.Module):
    """Blocks that get the first hidden states as well, as some hybrids' do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, input_ids):
        first = hidden = self.embedding(input_ids)
        beside = self.beside(first)
        for block in self.blocks:
            hidden = block(hidden, first=first) + 0.1 * hidden
        return hidden + beside

    def beside(self, first):
        """What no block is given, and the model still holds."""
        return first * 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden, *, first):
        return torch.tanh(self.linear(hidden)) + first


@pytest.mark.parametrize("with_spill", [False, True])
def test_a_run_gives_what_the_model_gives(tmp_path, with_spill):
    torch.manual_seed(0)
    model = Model()
    batches = [{"input_ids": torch.randint(0, 50, (2, 9))} for _ in range(5)]
    with torch.no_grad():
        expected = [model(**batch) for batch in batches]
    results, in_memory = {}, []

    def visit(position, calls):
        in_memory.append(sum(call.args[0].untyped_storage().nbytes() > 0 for call in calls.batches))
        for call in calls:
            model.blocks[position](*call.args, **call.kwargs)
        return model.blocks[position]

    spill = Spill(tmp_path, [*model.buffers()]) if with_spill else None
    with torch.no_grad():
        run_blocks(model, list(model.blocks), batches, visit, finish=results.__setitem__, spill=spill)
    assert all(torch.equal(results[number], value) for number, value in enumerate(expected))
    assert in_memory == [0 if with_spill else 5] * 4


def test_what_the_model_holds_beside_the_arguments_of_earlier_calls_is_on_disk_too(tmp_path):
    torch.manual_seed(0)
    model = Model()
    batches = [{"input_ids": torch.randint(0, 50, (2, 9))} for _ in range(3)]
    made, results, in_memory = [], {}, []
    for block in model.blocks:  # only the first is given what the embedding made
        block.forward = lambda hidden, first, block=block: torch.tanh(block.linear(hidden))
    model.embedding.register_forward_hook(lambda *arguments: made.append(arguments[-1].untyped_storage()))
    with torch.no_grad():
        expected = [model(**batch) for batch in batches]
    made.clear()

    def visit(position, calls):
        in_memory.append(sum(storage.nbytes() > 0 for storage in made))
        return model.blocks[position]

    with torch.no_grad():
        run_blocks(model, list(model.blocks), batches, visit, finish=results.__setitem__, spill=Spill(tmp_path))
    assert all(torch.equal(results[number], value) for number, value in enumerate(expected))
    assert in_memory == [0] * 4


def test_what_two_batches_share_stays_in_memory(tmp_path):
    one, other, shared = torch.randn(100), torch.randn(100), torch.randn(100)
    kept, spill = shared.clone(), Spill(tmp_path)
    spill.put([one, shared])
    assert held(one, shared) == [0, 0]
    spill.put([other, shared])
    assert held(one, other, shared) == [0, 0, 400]
    assert torch.equal(shared, kept)
