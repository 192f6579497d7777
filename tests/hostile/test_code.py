"""Nothing of a checkpoint is executed: a canary file that would be written if something were."""

import inspect
import json
import pickle

import hostile
import models
import pytest

from quantkit import load, quantize
from quantkit.checkpoint import Hub, load_tokenizer, open_folder
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.inspection import inspect_checkpoint

FILES = ("x.py", "modeling_x.py", "configuration_x.py", "tokenization_x.py", "setup.py", "sitecustomize.py")
CODE = ["x.X", "x.X"]
AUTO_MAP = {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.X", "AutoTokenizer": CODE}
ELSEWHERE = {name: f"somebody/else--{code}" for name, code in AUTO_MAP.items() if isinstance(code, str)}
UNKNOWN = {"model_type": "nonesuch", "architectures": ["X"]}
PYTHON_CLASSES = {"quant_type": {"default": {"_type": "os.system", "_data": "x"}}}


class Opens:
    """Writes the canary when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def hostile_folder(model_folder, tmp_path, canary):
    """A tiny model with code in every file that some software would import or unpickle, and other values."""

    def make(config=None, tokenizer=None, files=None):
        folder = models.copy(model_folder("llama"), tmp_path / "model")
        code = f"open({str(canary)!r}, 'w').close()\nclass X: pass\n"
        for name in (*FILES, "custom_generate/generate.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code, encoding="utf-8")
        data = pickle.dumps(Opens(canary))
        for name in (
            "vocab.pkl",
            "tokenizer.pkl",
            "training_args.bin",
            "scheduler.pt",
            "optimizer.pth",
            *(files or ()),
        ):
            (folder / name).write_bytes(data)
        models.change_config(folder, **(config or {}))
        if tokenizer is not None:
            path = folder / "tokenizer_config.json"
            path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | tokenizer), encoding="utf-8")
        return folder

    return make


def tried(folder, tmp_path):
    """Everything that reads a model's folder, and what it said."""
    calls = {
        "open": lambda: open_folder(folder, Hub()),
        "inspect": lambda: inspect_checkpoint(folder),
        "tokenizer": lambda: load_tokenizer(folder),
        "load": lambda: load(folder),
        "quantize": lambda: quantize(folder, tmp_path / "out", steps=["int8"], progress=False),
        "dequantize": lambda: quantize(folder, tmp_path / "two", steps=["int8"], dequantize=True, progress=False),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = None
        except QuantkitError as error:
            said[name] = str(error)
    return said


def test_the_canary_sings(hostile_folder, canary, monkeypatch, tmp_path):
    """Code that runs and a pickle that is read leave the file that all tests look for."""
    folder = hostile_folder()
    exec(compile((folder / "x.py").read_text(encoding="utf-8"), "x.py", "exec"), {})
    assert canary.exists()
    canary.unlink()
    pickle.loads((folder / "vocab.pkl").read_bytes()).close()
    assert canary.exists()


def test_with_trust_the_code_runs(hostile_folder, canary, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = hostile_folder({"auto_map": AUTO_MAP, **UNKNOWN})
    with pytest.raises(CheckpointError):
        open_folder(folder, Hub(trust_remote_code=True))
    assert canary.exists()


REFUSED = {
    "code of its own": {"auto_map": AUTO_MAP, **UNKNOWN},
    "code for its config alone": {"auto_map": {"AutoConfig": "x.X"}, **UNKNOWN},
    "code of another repository": {"auto_map": ELSEWHERE, **UNKNOWN},
    "a list of code": {"auto_map": ["x.X"], **UNKNOWN},
    "attention from the hub": {"attn_implementation": "somebody/kernel"},
    "attention from the hub, as transformers writes it": {"_attn_implementation": "somebody/kernel@main:x"},
    "attention of a part from the hub": {"attn_implementation": {"": "eager", "vision_config": "somebody/kernel"}},
    "paged attention from the hub": {"attn_implementation": "paged|somebody/kernel"},
    "experts from the hub": {"experts_implementation": "somebody/kernel"},
    "a part's attention from the hub": {"text_config": {"attn_implementation": "somebody/kernel"}},
    "other weights": {"transformers_weights": "vocab.safetensors"},
    "a pickle for weights": {"transformers_weights": "adapter_model.bin"},
    "weights elsewhere": {"transformers_weights": "../model.safetensors"},
    "a python class": {"quantization_config": {"quant_method": "torchao", **PYTHON_CLASSES}},
    "a method that is a path": {"quantization_config": {"quant_method": "../../x"}},
    "a method of its own": {"quantization_config": {"quant_method": "x.X"}},
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_code_that_a_config_names_is_refused(what, hostile_folder, canary, tmp_path):
    said = tried(hostile_folder(REFUSED[what], files=["adapter_model.bin"]), tmp_path)
    assert not canary.exists()
    assert all(said[name] for name in ("open", "load", "quantize")), said


IGNORED = {
    "code for a model that transformers knows": {"auto_map": AUTO_MAP},
    "code that is no table": {"auto_map": "x.X"},
    "a way to generate": {"custom_generate": "custom_generate/generate.py"},
    "a dtype that is a function": {"torch_dtype": "os.system"},
    "pipelines": {"custom_pipelines": {"x": {"impl": "x.X", "pt": ["AutoModelForCausalLM"]}}},
}


@pytest.mark.parametrize("what", list(IGNORED))
def test_code_that_a_config_names_is_not_run(what, hostile_folder, canary, tmp_path):
    said = tried(hostile_folder(IGNORED[what]), tmp_path)
    assert not canary.exists()
    assert said["load"] is None


TOKENIZERS = {
    "a class of its own": {"auto_map": {"AutoTokenizer": CODE}, "tokenizer_class": "X"},
    "a class of its own beside a known one": {"auto_map": {"AutoTokenizer": CODE}},
    "a list": {"auto_map": CODE, "tokenizer_class": "X"},
    "a module's function": {"tokenizer_class": "os.system"},
    "pickles": {"tokenizer_class": "TransfoXLTokenizer", "pretrained_vocab_file": "vocab.pkl"},
    "files elsewhere": dict.fromkeys(("vocab_file", "tokenizer_file", "merges_file"), "/etc/passwd"),
    "another repository": {"auto_map": {"AutoTokenizer": ["somebody/else--x.X", None]}, "tokenizer_class": "X"},
}


@pytest.mark.parametrize("what", list(TOKENIZERS))
def test_code_that_a_tokenizer_names_is_not_run(what, hostile_folder, canary, tmp_path):
    folder = hostile_folder(tokenizer=TOKENIZERS[what])
    tried(folder, tmp_path)
    assert not canary.exists()
    if what == "files elsewhere":
        assert load_tokenizer(folder).encode("ab") == models.tokenizer().encode("ab")


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ self.__init__.__globals__ }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__ }}{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_stays_in_transformers_sandbox(template, hostile_folder, canary, tmp_path):
    folder = hostile_folder(tokenizer={"chat_template": template.replace("CANARY", str(canary))})
    (folder / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)), encoding="utf-8")
    rows = tmp_path / "x.json"
    rows.write_text('[{"messages": [{"role": "user", "content": "x"}]}]', encoding="utf-8")
    with pytest.raises(QuantkitError, match="chat template"):
        quantize(folder, tmp_path / "out", steps=["smoothquant", "w8a8"], dataset=str(rows), seq_len=8, progress=False)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickled_weights_are_refused_with_the_remedy(name, hostile_folder, canary, tmp_path):
    folder = hostile_folder(files=[name])
    (folder / "model.safetensors").unlink()
    said = tried(folder, tmp_path)
    assert not canary.exists()
    for command in ("open", "load", "quantize", "inspect"):
        assert "pickle" in said[command]
        assert "save_pretrained" in said[command]


def test_an_adapter_is_refused(hostile_folder, canary, tmp_path):
    """With peft installed transformers would apply it, and load the model that it names."""
    folder = hostile_folder(files=["adapter_model.bin"])
    words = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere")}
    (folder / "adapter_config.json").write_text(json.dumps(words), encoding="utf-8")
    said = tried(folder, tmp_path)
    assert not canary.exists()
    assert all("adapter" in (sentence or "") for sentence in said.values()), said


def test_remote_code_is_off_by_default():
    assert Hub().trust_remote_code is False
    for function in (load, load_tokenizer, quantize):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False


TOKENIZER_FILES = {
    "tokenizer_config.json": [
        b"[" * 100_000,
        b"[]",
        b"5",
        b"{",
        b'{"added_tokens_decoder": 5}',
        b'{"tokenizer_class": 5}',
    ],
    "tokenizer.json": [b"[" * 100_000, b"[]", b"{}", b"", b'{"model": {"type": "BPE"}}', b"\xff"],
    "special_tokens_map.json": [b"[5]", b"{"],
    "config.json": [b"[" * 100_000, b'{"model_type": "llama", "dtype": "load"}'],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in TOKENIZER_FILES.items() for text in texts])
def test_tokenizer_files_that_are_none_are_refused_or_unused(file, text, model_folder, tmp_path):
    folder = models.copy(model_folder("llama"), tmp_path / "model")
    (folder / file).write_bytes(text)
    found = hostile.answer(lambda: load_tokenizer(folder))
    assert not isinstance(found, CheckpointError) or str(folder) in str(found)
