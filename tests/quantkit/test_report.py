import json

import models
import pytest

from quantkit import quantize
from quantkit.checkpoint import Hub, open_folder
from quantkit.outcome import GroupReport
from quantkit.report import LayerReport, Report, group_lines, model_card, write_report

EVALUATION = {
    "perplexity": 12.3456789,
    "perplexity_stderr": 0.1,
    "baseline_perplexity": 12.0,
    "kl_mean": 1.5e-3,
    "top1_agreement": 0.987,
    "tokens": 12345,
    "dataset": "wikitext2",
}


@pytest.fixture(scope="module")
def report(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "out"
    return quantize(model_folder("llama_unused"), output, steps=["w8a8"], ignore=["*.mlp.*"], progress=False)


def made(layers):
    return Report("m", {"steps": ["w8a8"]}, "f", layers, [], [], {}, [], 10, 5, {"tensors": 1})


def test_bits_per_weight_is_weighted_by_size_and_the_worst_is_the_worst():
    small, large = LayerReport("a", "int8", (2, 2), 16.0, 0.5), LayerReport("b", "int8", (4, 3), 8.0, 0.1)
    report = made([small, large])
    assert report.bits_per_weight == (16 * 4 + 8 * 12) / 16
    assert report.worst is small


def test_the_text_says_everything_once(report):
    text = report.to_text()
    expected = ["w8a8", "compressed-tensors", "8 linear layers", "--ignore *.mlp.*: 6 linear layers", "ignored by"]
    expected += ["lm_head: makes the logits", "left.over", "does not use", "smaller", "peak memory", "read back"]
    expected += ["model.layers.0.mlp.gate_proj", "and 3 more", report.worst.module, f"{report.bytes_after:,}"]
    for words in expected:
        assert text.count(words) >= 1, words


def test_smoothing_is_told_with_every_reason(tmp_path):
    groups = [
        GroupReport("b.0", "norm", "norm", ("q",), "folded", 0.5, 0.1),
        GroupReport("b.1", "norm", "norm", ("q",), "folded", 0.5, 0.1),
        GroupReport("b.0", "v", "linear", ("o",), "undone", 0.5, 3.0, "its output changed"),
        *(GroupReport(f"b.{n}", "up", "linear", (), "refused", reason="it feeds gelu") for n in range(4)),
    ]
    report = made([])
    report.groups = groups
    assert group_lines(groups) == [
        "  smoothing  2 groups folded, 1 groups undone, 4 groups refused",
        "  not folded b.0.v: undone: its output changed",
        "  not folded b.0.up, b.1.up, b.2.up and 1 more: refused: it feeds gelu",
    ]
    assert all(line in report.to_text() for line in group_lines(groups))
    assert group_lines([]) == []
    write_report(tmp_path, report)
    stored = json.loads((tmp_path / "quantkit_report.json").read_text())["groups"]
    assert [group["state"] for group in stored] == [group.state for group in groups]


def test_a_report_on_smoothing_alone_says_that_nothing_is_quantized(model_folder, calibration, tmp_path):
    report = quantize(model_folder("llama"), tmp_path / "out", steps=["smoothquant"], progress=False, **calibration)
    assert "quantized  nothing: all weights stay in float" in report.to_text()
    assert report.worst is None
    assert (report.format, report.layers) == ("float", [])
    assert report.bytes_after == report.bytes_before


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_reported_one_by_one(model_folder, tmp_path, name):
    report = quantize(model_folder(name), tmp_path / "out", steps=["int8"], progress=False)
    names = [layer.module for layer in report.layers]
    assert len(names) == len(set(names))
    assert sum(".experts." in module for module in names) == (24 if name == "mixtral" else 16)
    stored = models.read_tensors(tmp_path / "out")
    assert {key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")} == set(names)


def test_the_dict_is_the_file(report, tmp_path):
    write_report(tmp_path, report)
    assert [path.name for path in tmp_path.iterdir()] == ["quantkit_report.json"]
    assert json.loads((tmp_path / "quantkit_report.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_the_versions_are_those_that_run(report):
    import platform

    import safetensors
    import torch
    import transformers

    assert report.versions["python"] == platform.python_version()
    for package in (torch, transformers, safetensors):
        # a build of torch says +cu130 of itself, and its wheel may not
        assert package.__version__.startswith(report.versions[package.__name__].partition("+")[0])


def test_an_evaluation_is_in_the_text_and_the_card(report, model_folder):
    source = open_folder(model_folder("llama_unused"), Hub())
    assert "quantkit eval THIS" in model_card(report, source)
    report.evaluation = EVALUATION
    try:
        for text in (report.to_text(), model_card(report, source)):
            for words in ("12.3457 ± 0.1000", "12.0000", "1.50e-03", "98.70%", "12,345 tokens of wikitext2"):
                assert words in text
            assert "arning" not in text
        assert "quantkit eval THIS" not in model_card(report, source)
        report.evaluation = EVALUATION | {"warning": "a mean KL of 2 nats is above 0.1"}
        assert "  warning    a mean KL of 2 nats is above 0.1" in report.to_text().splitlines()
        assert "\nWarning: a mean KL of 2 nats is above 0.1.\n" in model_card(report, source)
    finally:
        report.evaluation = None


def test_the_card_keeps_the_data_sets_name_as_it_is_written(report, model_folder, monkeypatch):
    monkeypatch.setattr(report, "evaluation", EVALUATION | {"dataset": "Org/WikiText:Raw"})
    card = model_card(report, open_folder(model_folder("llama_unused"), Hub()))
    assert "\nPerplexity 12.3457" in card
    assert "KL 1.50e-03, top-1 98.70%, 12,345 tokens of Org/WikiText:Raw." in card


@pytest.mark.parametrize(
    ("called", "title"),
    [(".", "Größe"), ("./", "Größe"), ("..", "Größe"), ("org/Some-Model", "Some-Model"), ("a/b.c/", "b.c")],
)
def test_the_cards_title_is_a_name(report, model_folder, tmp_path, monkeypatch, called, title):
    folder = models.copy(model_folder("llama_unused"), tmp_path / "Größe")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(report, "model", called)
    source = open_folder(folder if called == ".." else ".", Hub())
    assert f"\n# {title}, compressed\n" in model_card(report, source)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "license: apache-2.0"),
        ("---\ntags:\n- x\nlicense:  mit \n---\n# x", "license: mit"),
        ("# no front matter\nlicense: mit\n---\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("---\nlicense:\ntags: x\n---\n", None),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\nlicense: [mit,\n  apache-2.0]\n---\n", None),
        ("---\nlicense: ''\n---\n", None),
        ("# A rule is no front matter\n---\nlicense: mit\n---\n", None),
        ("", None),
        (None, None),
    ],
)
def test_the_card_keeps_the_sources_licence(report, model_folder, tmp_path, card, expected):
    folder = models.copy(model_folder("llama_unused"), tmp_path / "model")
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card)
    front = model_card(report, open_folder(folder, Hub())).split("---")[1]
    assert [line for line in front.splitlines() if line.startswith("license")] == ([expected] if expected else [])
