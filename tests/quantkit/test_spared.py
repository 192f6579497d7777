"""What zeros spare, as numbers and as lines."""

import pytest

from quantkit import spared
from quantkit.outcome import ChangedActivation, SparsityReport

LAYERS = [
    SparsityReport("a.0.down", (4, 8), {"1": 0.0, "2": 0.0}, {"1": 0.5, "2": 0.25}, 1.0, 16.0),
    SparsityReport("a.1.down", (4, 8), {"1": 0.1, "2": 0.0}, {"1": 0.7, "2": 0.35}, 1.0, 16.0),
    SparsityReport("a.0.experts", (10, 6), {"1": 0.0}, {"1": 0.25}, 2.0, 8.0),
    SparsityReport("a.0.q", (8, 8), {"1": 0.0}, {"1": 0.0}, 1.0, 32.0),
]


def test_totals_follow_from_the_formula():
    flops = 2 * 4 * 8 * 2 + 2 * 10 * 6 * 2 + 2 * 8 * 8
    found = spared.totals(LAYERS)
    assert found["flops"] == flops
    assert found["flops_spared"] == pytest.approx(64 * 0.5 + 64 * 0.7 + 240 * 0.25)
    assert found["bytes"] == 2 * 32 * 2 + 60 * 2 + 64 * 4
    assert found["bytes_spared"] == pytest.approx(64 * 0.5 + 64 * 0.7 + 120 * 0.25)
    assert spared.to_list(LAYERS)[0]["flops_spared"] == 32


def test_lines_tell_layers_of_one_name_together():
    lines = spared.zeros_lines(LAYERS)
    assert lines == [
        "down: 5.0% -> 60.0% of the input; in all of 2 tokens 30.0%",
        "experts: 0.0% -> 25.0% of the input",
    ]
    assert spared.decode_line(LAYERS).startswith("a token's zeros spare 27.6% of the blocks' linear layers: 137 of 496")


def test_changes_are_told_in_a_line():
    made = [ChangedActivation("a", "activation", 0.0), ChangedActivation("b", "norm", 0.0)]
    assert spared.changed_line(made) == "relu in place of 1 activation, relu behind 1 norm"
    limits = [ChangedActivation(name, "threshold", value) for name, value in (("a", 0.25), ("b", 1.5))]
    assert spared.changed_line(limits) == "thresholds before 2 linear layers (0.25 to 1.5)"
    assert spared.changed_line([]) is None
