"""A small language model that comes with the package, and the text it was trained on and is measured with."""

from pathlib import Path


def model_path() -> Path:
    """The folder of the demo model: a Hugging Face checkpoint, as `from_pretrained` takes it."""
    return Path(__file__).parent / "model"
