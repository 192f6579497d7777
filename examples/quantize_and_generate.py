"""Compress a model, load the result with its weights packed, and let it speak.

python examples/quantize_and_generate.py [MODEL] [--step STEP] [--prompt TEXT]
"""

import argparse
import tempfile
from pathlib import Path

import quantkit
from quantkit.demo import model_path
from quantkit.generation import complete


def main() -> None:
    """Print the report and a completion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(model_path()), help="folder or hub id; default: the demo model")
    parser.add_argument("--step", default="w8a8", help="see `quantkit methods`")
    parser.add_argument("--prompt", default="The value of the expression is")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "compressed"
        report = quantkit.quantize(arguments.model, output, steps=[arguments.step])
        print(report.to_text())
        print(complete(output, arguments.prompt, max_new_tokens=40))


if __name__ == "__main__":
    main()
