"""Architectures through the whole pipeline: quantized, written, read back, run, with an error that 8 bits explain."""

from pathlib import Path

import pytest
from architectures import BUILDABLE, ENTRIES, UNBUILDABLE
from run import RECIPES, measure
from table import fine

ROOT = Path(__file__).parent.parent.parent
UNLIKE = (
    "llama",
    "gpt2",
    "opt",
    "falcon",
    "gemma2",
    "olmo2",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "jamba",
    "hrm_text",
    "recurrent_gemma",
)
FOLDED = {"llama": 4, "gpt2": 4, "opt": 4, "falcon": 2, "gemma2": 4, "olmo2": 0, "mixtral": 4, "gpt_oss": 4}
"""Norms that fold: one or two a block of two blocks; OLMo 2's come after its layers."""

UNLIKE_FIRST = [pytest.param(name, marks=() if name in UNLIKE else pytest.mark.exhaustive) for name in BUILDABLE]


@pytest.mark.parametrize("model_type", UNLIKE_FIRST)
def test_every_recipe_finishes_with_an_error_that_8_bits_explain(model_type: str) -> None:
    rows = {row["recipe"]: row for row in measure(model_type)}
    assert set(rows) == set(RECIPES)
    for recipe, row in rows.items():
        assert fine(row), f"{recipe}: {row}"
    assert rows["smoothquant+w8a8"]["undone"] == []
    if model_type in FOLDED:
        assert rows["smoothquant+w8a8"]["groups"].get("norm folded", 0) == FOLDED[model_type]


def test_the_page_on_architectures_names_every_entry() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    for entry in ENTRIES:
        assert (f"- {entry}:" if entry in UNBUILDABLE else f"| {entry} |") in page, entry
    assert "**!**" not in page
    assert "failed" not in page
