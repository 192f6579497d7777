import hashlib
import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.demo import corpus, model_path
from quantkit.errors import DataError

WINDOW = 512
HELD_OUT_WINDOWS = 16


def paragraphs(text: str) -> set[str]:
    return {" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if len(" ".join(p.split())) >= 60}


def test_documents_are_the_same_in_another_process() -> None:
    program = (
        "import hashlib; from quantkit.demo import corpus; "
        "print(hashlib.sha256(repr(corpus.documents()).encode()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(repr(corpus.documents()).encode()).hexdigest()


def test_documents_are_named_and_sorted() -> None:
    names = [document.name for document in corpus.documents()]
    assert names == sorted(set(names))
    assert {"topics/compound", "json.decoder", "json", "argparse"} <= set(names)
    assert not [name for name in names if name.startswith(("test.", "idlelib", "site-packages", "torch"))]


def test_the_two_parts_share_no_document_and_no_long_paragraph() -> None:
    held_out = [document for document in corpus.documents() if document.held_out]
    trained = [document for document in corpus.documents() if not document.held_out]
    assert not {d.name for d in held_out} & {d.name for d in trained}
    assert not {d.text for d in held_out} & {d.text for d in trained}
    assert corpus.held_out_text() == "\n\n".join(d.text for d in held_out)
    assert corpus.training_text() == "\n\n".join(d.text for d in trained)
    assert not paragraphs(corpus.held_out_text()) & paragraphs(corpus.training_text())


def test_sizes() -> None:
    trained, held_out = len(corpus.training_text().encode()), len(corpus.held_out_text().encode())
    assert 1_400_000 < trained + held_out < 3_500_000
    assert 0.06 < held_out / (trained + held_out) < 0.14


@pytest.mark.parametrize(("name", "held_out"), [("topics/debugger", True), ("codecs", True), ("json.decoder", False)])
def test_a_name_alone_decides_the_part(name: str, held_out: bool) -> None:
    """Worked out once and written down: another rule would measure the model on what it was trained on."""
    assert corpus.Document(name, "anything").held_out is held_out


def test_docstrings_come_in_source_order_and_unparsable_source_gives_none() -> None:
    source = b"""'M.'\nif 1:\n    class A:\n        'A.'\n        async def f(self): 'F.'\ndef g():\n    'G.'\n"""
    assert list(corpus._docstrings(source)) == ["M.", "A.", "F.", "G."]
    assert list(corpus._docstrings(b"print 1")) == []
    assert list(corpus._docstrings(b"\0")) == []


def test_a_long_paragraph_is_kept_only_once_and_a_short_one_always() -> None:
    long, seen = "a long paragraph of text " * 4, set[str]()
    assert corpus._unseen_paragraphs(f"Short.\n\n{long}\n", seen) == f"Short.\n\n{long.rstrip()}"
    assert corpus._unseen_paragraphs(f"Short.\n \n  {long}", seen) == "Short."


def test_a_python_without_sources_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"docstrings in its sources.*use a full CPython"):
        corpus.documents()


def test_a_python_without_topics_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(corpus, "_documents", corpus._documents.__wrapped__)
    with pytest.raises(DataError, match=r"help topics.*use a full CPython"):
        corpus.held_out_text()


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys; import quantkit.demo.corpus; quantkit.demo.model_path(); "
        "sys.exit(' '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_tokenizer_round_trip(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_adds_nothing(tokenizer) -> None:
    assert len(tokenizer) == 2048
    assert tokenizer.encode("") == []
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id not in tokenizer.encode(corpus.held_out_text())
    assert tokenizer.decode(tokenizer.encode(corpus.held_out_text())) == corpus.held_out_text()


def test_model_card_and_size() -> None:
    assert (model_path() / "model.safetensors").stat().st_size <= 8_000_000
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    assert "examples/train_demo_model.py" in card
    assert "license: apache-2.0" in card


def test_shapes_serve_groups_of_128() -> None:
    config = AutoModelForCausalLM.from_pretrained(model_path()).config
    assert config.model_type == "llama"
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config.head_dim >= 32
    assert config.num_key_value_heads < config.num_attention_heads
    assert (config.tie_word_embeddings, config.max_position_embeddings) == (True, WINDOW)
    assert not config.attention_bias
    assert not config.mlp_bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_out_bits_per_byte(tokenizer, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype)
    assert model.dtype == dtype
    ids = torch.tensor(tokenizer.encode(corpus.held_out_text()))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    windows = windows[:: len(windows) // HELD_OUT_WINDOWS][:HELD_OUT_WINDOWS]
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].float()
    targets = windows[:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    size = len(tokenizer.decode(windows.flatten()).encode())
    bits_per_byte = nats / math.log(2) * windows.numel() / size
    assert bits_per_byte < 1.9
    # The entropy of these tokens under their own frequencies: no unigram model is better.
    p = torch.bincount(targets.flatten()) / targets.numel()
    unigram = -(p[p > 0] * p[p > 0].log()).sum().item()
    assert nats < 0.7 * unigram
