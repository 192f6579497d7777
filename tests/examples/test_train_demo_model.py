import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_model.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_short_training_leaves_a_checkpoint_and_prints_figures(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--steps", "2", "--batch", "512", "--threads", "1"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("The `with` statement", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], 2048)
    assert (tmp_path / "model.safetensors").stat().st_size <= 8_000_000
    assert "s left" in done.stderr
    bits = dict(line.split(": perplexity ") for line in done.stdout.splitlines() if "bits per byte" in line)
    assert list(bits) == ["unigram", "bigram", "model"]
    unigram, bigram, _ = (float(figure.split(", ")[1].split()[0]) for figure in bits.values())
    assert 1 < bigram < unigram < 4


def test_the_seed_decides_the_weights(example: ModuleType) -> None:
    tokens = torch.randint(2048, (6000,), generator=torch.Generator().manual_seed(0))

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = example.new_model()
        example.train(model, tokens, steps=3, batch=512, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert weights(1).equal(weights(1))
    assert not weights(1).equal(weights(2))


def test_ngrams_are_distributions(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihoods of every next token after one context, taken one by one, sum to one."""
    monkeypatch.setattr(example, "VOCABULARY", 50)
    seen = torch.randint(40, (500,), generator=torch.Generator().manual_seed(0))
    losses = [example.ngram_nats(seen, torch.tensor([7, token])) for token in range(50)]
    sums = torch.tensor(losses, dtype=torch.float64).neg().exp().sum(0)
    torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
