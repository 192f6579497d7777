"""Configurations: the user's table first, then the package's; the heuristic; nothing asked of a device twice."""

import json

import pytest
import torch
from quantkit_kernels import configurations
from quantkit_kernels.configurations import FAMILIES, PACKAGE_TABLES, architecture, configuration, family
from quantkit_kernels.errors import KernelError

SCALED = ("int8_scaled_mm", "fp8_scaled_mm", "block_scaled_mm")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a writer of the user's table of sm_90; what other tests read is not seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "quantkit" / "kernels" / "sm_90.json"
    path.parent.mkdir(parents=True)
    return lambda kernels: path.write_text(kernels if isinstance(kernels, str) else json.dumps({"kernels": kernels}))


def tile(block_m: int, block_n: int) -> dict[str, int]:
    return {"block_m": block_m, "block_n": block_n}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_has_a_table_that_says_whether_it_was_measured(architecture):
    path = PACKAGE_TABLES / f"sm_{architecture}.json"
    content = json.loads(path.read_text())
    assert content["measured"] is False
    table = configurations.table(path)
    assert table.processors > 0
    assert all(entries for entries in table.kernels.values())
    assert set(SCALED) - set(table.kernels) == (set(SCALED[1:]) if architecture < 89 else set())
    assert sorted(path.name for path in PACKAGE_TABLES.glob("*.json")) == sorted(f"sm_{a}.json" for a in FAMILIES)


@pytest.mark.parametrize(("device", "expected"), [(80, 80), (87, 86), (89, 89), (90, 90), (103, 100), (121, 120)])
def test_family_is_the_nearest_below(device, expected):
    assert family(device) == expected


def test_devices_before_sm_80_are_refused():
    with pytest.raises(KernelError, match=r"sm_75: Triton kernels need sm_80 or later, use backend"):
        configuration("int8_scaled_mm", 1, 1, 1, 75)


@pytest.mark.parametrize(
    ("tokens", "out_features", "expected"),
    [
        (1, 4096, (16, 64)),  # few tokens: as many programs as can be
        (64, 4096, (32, 64)),  # 128 programs of 132 processors; 64 x 64 would leave half of them idle
        (512, 4096, (128, 128)),  # 128 programs at once; 256 wide there would be 64
        (4096, 4096, (128, 256)),  # 4 rounds of 384 rows, against 8 of 256
        (8192, 28672, (128, 256)),
    ],
)
def test_the_heuristic_takes_the_tile_that_brings_in_least(cache, tokens, out_features, expected):
    for kernel in SCALED[:2]:
        found = configuration(kernel, tokens, out_features, 4096, 90)
        assert (found["block_m"], found["block_n"]) == expected


def test_the_users_table_comes_first_and_narrow_entries_before_broad_ones(cache):
    cache(
        {
            "int8_scaled_mm": [
                {"config": tile(1, 1)},
                {"tokens": 64, "config": tile(2, 2)},
                {"tokens": 16, "config": tile(3, 3)},
                {"out_features": 4096, "in_features": 4096, "config": tile(4, 4)},
                {"tokens": 16, "out_features": 4096, "in_features": 4096, "config": tile(5, 5)},
            ]
        }
    )
    found = {
        shape: configuration("int8_scaled_mm", *shape, 90)["block_m"]
        for shape in [(65, 32, 32), (64, 32, 32), (16, 32, 32), (17, 4096, 4096), (16, 4096, 4096), (16, 4096, 32)]
    }
    assert list(found.values()) == [1, 2, 3, 4, 5, 3]
    assert configuration("fp8_scaled_mm", 1, 4096, 4096, 90)["block_m"] == 16, "a kernel that it does not name"
    assert configuration("int8_scaled_mm", 1, 4096, 4096, 80)["block_m"] == 16, "another architecture"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        {"int8_scaled_mm": [{"tokens": 4}]},
        {"int8_scaled_mm": [{"config": tile(0, 16)}]},
        {"int8_scaled_mm": [{"config": {"block_m": "16"}}]},
        {"int8_scaled_mm": [{"config": tile(16, 16), "token": 4}]},
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_name(cache, content):
    cache(content)
    with pytest.raises(KernelError, match=r"sm_90\.json is not a table of kernel configurations.*mend or delete it"):
        configuration("int8_scaled_mm", 1, 16, 16, 90)


def test_what_is_no_tile_is_refused(cache):
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    from quantkit_kernels.gpu.tiles import tile_config

    cache({"int8_scaled_mm": [{"config": {"block": 4}}]})
    codes = torch.zeros(16, 16, dtype=torch.int8)
    with pytest.raises(KernelError, match=r"int8_scaled_mm has the configuration .*expected block_m, .*mend or delete"):
        tile_config("int8_scaled_mm", codes, codes, 90)


def test_a_kernel_without_an_entry_is_refused():
    with pytest.raises(KernelError, match=r"fp8_scaled_mm has no configuration in sm_80\.json"):
        configuration("fp8_scaled_mm", 1, 16, 16, 80)


def test_what_is_returned_can_be_changed_without_harm():
    configuration("int8_scaled_mm", 1, 16, 16, 90)["block_m"] = 7
    assert configuration("int8_scaled_mm", 1, 16, 16, 90)["block_m"] != 7


def test_a_device_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (10, 3))
    configurations._capability.cache_clear()
    assert [architecture(torch.device("cuda", 1)) for _ in range(3)] == [103] * 3
    assert asked == [1]
    configurations._capability.cache_clear()
    assert architecture(torch.device("cpu")) == 90
