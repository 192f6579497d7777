"""Prints the table of docs/serving.md: how far vLLM's predictions of each checkpoint are from ours.

python tests/serving/measure.py path/of/vllm/python DATA [MODEL ...]
"""

import sys
import tempfile
from pathlib import Path

import transformers
from serving_models import MODELS, REAL, SCHEMES, build, compress
from vllm_process import Ours, Vllm

HEADER = """\
| model | scheme | Q | float32: mean | moved | bfloat16: mean | 2 (Q + N) | first choice |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
ROUGH = ("w8a8", "fp8")
"""Schemes that are served in bfloat16 as well."""


def rows(vllm: Vllm, name: str, scheme: str, base: Path, compressed: Path) -> str:
    """The lines of one checkpoint; a rule that doesn't hold is set in bold."""
    served = vllm.serve(compressed)
    exact = Ours().agreement(served, compressed, base, "float32")
    cells = [f"{exact.quantization:.1e}", _marked(exact.mean, exact.is_exact), f"{exact.moved:.0%}", "", "", ""]
    if scheme in ROUGH:
        rough = Ours().agreement(vllm.serve(compressed, "bfloat16"), compressed, base, "bfloat16")
        explained = 2 * (rough.quantization + rough.rounding)
        cells[3:] = [_marked(rough.mean, rough.is_explained), f"{explained:.1e}", f"{rough.agreed:.0%}"]
    lines = [[name, scheme, *cells]]
    if "static" in scheme:
        plain = Ours(saturation=False).agreement(served, compressed, base, "float32")
        figures = [f"{plain.quantization:.1e}", f"{plain.mean:.1e}", f"{plain.moved:.0%}"]
        lines.append([name, f"{scheme}, stopping at -127", *figures, "", "", ""])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _marked(mean: float, holds: bool) -> str:
    return f"{mean:.1e}" if holds else f"**{mean:.1e}**"


def main(python: str, data: Path, names: list[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.write(HEADER)
    with tempfile.TemporaryDirectory() as scratch, Vllm(python, Path(scratch)) as vllm:
        for name in names or MODELS:
            folder = Path(scratch) / name
            folder.mkdir()
            base = data / "models" / name if name in REAL else build(name, folder / "model")
            for scheme, steps in {"float": [], **SCHEMES}.items():
                place = folder / scheme.replace(" ", "-")
                place.mkdir()
                compressed = compress(base, place, steps) if steps else base
                sys.stdout.write(rows(vllm, name, scheme, base, compressed))
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
