"""Forward passes in threads: what is raised comes out, what the caller has set holds, and nothing is left behind."""

import contextvars
import copy
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_calibration.sequential import Calls, run_blocks
from torch import nn
from toy_blocks import Toy, inputs


class BrokenError(Exception):
    pass


def broken(*args: Any) -> Any:
    raise BrokenError


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["embeddings", "between", "head", "visit", "output", "finish"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_an_exception_comes_out_as_it_is(where: str, batch: int, error: type[BaseException]) -> None:
    """In the model's thread before, between and after the blocks; in the caller's in all that it hands in."""
    raised = error()

    def strike(place: str, number: float) -> None:
        if place == where and number == batch:
            raise raised

    class Fragile(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            number = float(x[0, 0])
            strike("embeddings", number)
            x = self.blocks[0](x)
            strike("between", number)
            x = self.blocks[1](x)
            strike("head", number)
            return self.head(x)

    toy = Fragile([], blocks=2)
    own = toy.blocks[1].__dict__["forward"] = toy.blocks[1].forward

    def visit(index: int, calls: Calls) -> Callable[..., Any]:
        strike("visit", batch)
        outputs = iter(range(3))

        def run(x: torch.Tensor) -> torch.Tensor:
            strike("output", next(outputs))
            return toy.blocks[index](x)

        return run

    with pytest.raises(error) as caught:
        run_blocks(toy, list(toy.blocks), inputs(3), visit, finish=lambda number, _: strike("finish", number))
    assert caught.value is raised
    assert "forward" not in toy.blocks[0].__dict__
    assert toy.blocks[1].__dict__["forward"] is own


@pytest.mark.parametrize("swallowed", [Exception, BaseException])
def test_a_model_that_swallows_exceptions_ends_as_well(swallowed: type[BaseException]) -> None:
    """Where it swallows no more than Exception, it doesn't even go on."""
    gone_on = []

    class Stubborn(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                try:
                    x = block(x)
                except swallowed:
                    gone_on.append(x)
            return x

    toy = Stubborn([])
    with pytest.raises(BrokenError):
        run_blocks(toy, list(toy.blocks), inputs(3), broken)
    assert len(gone_on) == (0 if swallowed is Exception else 9)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timer on this system")
@pytest.mark.parametrize("where", ["model", "visit"])
def test_a_signal_ends_it(where: str) -> None:
    """Ctrl-C while a model's thread, or `visit`, is at work. The handler raises in the main thread, as Ctrl-C does."""
    busy = threading.Event()

    class Slow(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if where == "model" and float(x[0, 0]) == 1:
                busy.wait(0.3)
            return super().forward(x)

    def visit(index: int, calls: Calls) -> nn.Module:
        busy.wait(0.3)
        return toy.blocks[index]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    toy = Slow([0, 1, 2])
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            run_blocks(toy, list(toy.blocks), inputs(), visit)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not any("forward" in block.__dict__ for block in toy.blocks)


# What the caller has set for its thread, and what is in memory


def test_in_visit_the_model_is_its_own() -> None:
    """A copy made in `visit` runs by itself, and a `forward` given in `visit` stays."""
    toy = Toy([0, 1, 2])

    def visit(index: int, calls: Calls) -> Callable[..., Any]:
        twin = copy.deepcopy(toy.blocks[index])
        with torch.no_grad():
            twin.weight.zero_()
            twin.bias.fill_(index)
        assert twin(calls[0].args[0]).unique().tolist() == [index]
        toy.blocks[index].forward = twin.forward  # type: ignore[method-assign]
        return toy.blocks[index]

    run_blocks(toy, list(toy.blocks), inputs(), visit)
    assert toy.blocks[2](torch.ones(4)).tolist() == [2.0] * 4


def test_the_caller_s_settings_hold_in_the_model_s_part() -> None:
    """No gradient, but the caller's context variables, autocast, default device and inference mode."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: dict[str, Any] = {}

    class Watching(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen["grad"] = torch.is_grad_enabled()
            seen["variable"] = variable.get()
            seen["device"] = torch.empty(1).device.type
            seen["inference"] = torch.is_inference_mode_enabled()
            seen["dtype"] = self.head(x).dtype
            return super().forward(x)

    toy = Watching([0, 1, 2])

    def visit(block: nn.Module) -> nn.Module:
        seen["visit"] = torch.is_grad_enabled()
        return block

    def run(toy: Toy = toy) -> dict[str, Any]:
        batches = [{"x": torch.zeros(3, 4)} for _ in range(2)]
        run_blocks(toy, list(toy.blocks), batches, lambda index, calls: visit(toy.blocks[index]))
        return dict(seen)

    usual = {"grad": False, "variable": "none", "device": "cpu", "inference": False, "dtype": torch.float32}
    assert run() == {**usual, "visit": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run()["dtype"] == torch.bfloat16
    with torch.inference_mode():
        assert run() == {**usual, "inference": True, "visit": False}
    with torch.device("meta"):
        assert run(Watching([0, 1, 2]))["device"] == "meta"
    token = variable.set("set")
    assert run()["variable"] == "set"
    variable.reset(token)


def test_only_one_block_s_inputs_are_alive() -> None:
    """At each visit all that earlier blocks were called with is gone, also while a caller keeps `calls`."""
    toy = Toy([0, 1, 2])
    earlier: list[weakref.ref[torch.Tensor]] = []
    kept = []

    def visit(index: int, calls: Calls) -> None:
        assert not any(reference() is not None for reference in earlier)
        earlier.extend(weakref.ref(call.args[0]) for call in calls if index)  # block 0's are the caller's own
        kept.append(calls)
        for call in calls:
            call.output = toy.blocks[index](call.args[0]).detach()

    run_blocks(toy, list(toy.blocks), inputs(), visit)
    assert len(earlier) == 4


def test_a_callable_makes_one_output_at_a_time() -> None:
    """While an output is made, those of the batches before it have replaced their inputs; then the callable goes."""
    toy = Toy([0, 1, 2])
    most = 0
    of_runs: list[weakref.ref[Any]] = []

    def visit(index: int, calls: Calls) -> Callable[..., Any]:
        assert not any(reference() is not None for reference in of_runs)
        references = [weakref.ref(call.args[0]) for call in calls]

        def run(x: torch.Tensor) -> torch.Tensor:
            nonlocal most
            if index:
                most = max(most, sum(reference() is not None for reference in references))
                number = next(n for n, reference in enumerate(references) if reference() is x)
                assert [reference() is not None for reference in references] == [False] * number + [True] * (3 - number)
            return toy.blocks[index](x).detach()

        of_runs.append(weakref.ref(run))
        return run

    run_blocks(toy, list(toy.blocks), inputs(3), visit)
    assert most == 3


@pytest.mark.parametrize("place", ["before", "between"])
def test_threads_that_wait_keep_no_helpers(place: str) -> None:
    """A thread that computes on several cores keeps a helper for each: batches times cores of them."""
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("no /proc to count threads in")

    class Wide(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](x * 2 if place == "before" else x)
            return self.blocks[1](x * 2 if place == "between" else x)

    toy = Wide([])
    toy.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    wide = [{"x": torch.zeros(2**16, 4)} for _ in range(8)]
    before = torch.get_num_threads()
    counts: list[int] = []

    def visit(index: int, calls: Calls) -> nn.Module:
        counts.append(len(list(tasks.iterdir())))
        assert torch.get_num_threads() == 4
        return toy.blocks[index]

    try:
        torch.set_num_threads(4)
        torch.zeros(2**18).mul_(2)  # the caller's own helpers
        start = len(list(tasks.iterdir()))
        run_blocks(toy, list(toy.blocks), wide, visit)
        assert max(counts) <= start + 8
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert seen == [torch.get_num_threads()] == [4]
    finally:
        torch.set_num_threads(before)
