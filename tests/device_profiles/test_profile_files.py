"""Profile files: the bundled ones are good, and a bad one is refused in one line that names file, field and fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.device_profiles import load, names
from edgekv.device_profiles.schema import CONFIDENCES, ENGINES, WEIGHTS, Quantity
from edgekv.errors import ProfileError

PLANNED = [
    "raspberry-pi-5-8gb",
    "raspberry-pi-5-8gb-nvme",
    "raspberry-pi-5-4gb",
    "raspberry-pi-4-4gb",
    "jetson-orin-nano-8gb",
    "jetson-agx-orin-64gb",
    "galaxy-s24-8gb",
    "galaxy-s23-8gb",
    "pixel-8-8gb",
    "pixel-9-12gb",
    "iphone-15-pro-8gb",
    "iphone-16-pro-8gb",
    "iphone-13-pro-6gb",
    "android-low-4gb",
    "laptop-16gb",
    "oneplus-12-16gb",
    "galaxy-s22-8gb",
    "orange-pi-5-8gb",
    "iphone-17-pro-12gb",
    "laptop-i3-1315u-16gb",
    "laptop-ryzen-ai-5-340-16gb",
    "mini-pc-n150-16gb",
]
RAM = 'ram_bytes       = { value = "7942MiB", confidence = "high", source = "MemTotal (sbc-bench)" }'


def test_every_device_that_the_documentation_promises_is_bundled() -> None:
    assert set(PLANNED) <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_bundled_profile_loads_and_every_number_has_a_source_and_a_confidence(name: str) -> None:
    profile = load(name)
    assert profile.name == name
    for entry in profile.entries().values():
        if isinstance(entry, Quantity):
            assert entry.source.strip()
            assert entry.confidence in CONFIDENCES
            assert entry.confidence == "low" or not entry.source.startswith("estimate")


@pytest.mark.parametrize("name", names())
def test_every_bundled_profile_has_plausible_speeds_for_both_cpu_engines_and_all_weight_types(name: str) -> None:
    profile = load(name)
    for engine in ENGINES[:2]:
        for weights in WEIGHTS:
            rates = profile.rates(engine, weights)
            assert 1e9 < rates.weight_read_bytes_per_s.value < 1e12
            assert rates.kv_read_bytes_per_s.value <= rates.weight_read_bytes_per_s.value / 0.5
            assert 1e9 < rates.gemm_ops_per_s.value < 1e14
            assert not rates.by_weights


def test_sizes_are_whole_bytes_and_rates_accept_a_unit() -> None:
    profile = load("raspberry-pi-5-8gb")
    assert profile.memory.ram_bytes.value == 7942 * 2**20
    assert profile.memory.app_limit_bytes.value == 7_000_000_000
    assert isinstance(profile.memory.app_limit_bytes.value, int)
    assert profile.flash.read_bytes_per_s.value == 89e6
    assert str(profile.flash.read_t0_s) == "0.38 ms"
    assert str(profile.rates("executorch", "int4").gemm_ops_per_s) == "180 GOP/s"


def test_a_weight_type_overrides_only_what_it_states() -> None:
    profile = load("raspberry-pi-5-8gb")
    int4, int8 = profile.rates("executorch", "int4"), profile.rates("executorch", "int8")
    assert (int4.gemm_ops_per_s.value, int8.gemm_ops_per_s.value) == (180e9, 99e9)
    assert int4.weight_read_bytes_per_s == int8.weight_read_bytes_per_s


def test_an_engine_without_numbers_is_refused_with_those_that_have_some() -> None:
    with pytest.raises(ProfileError, match=r"no numbers for engine 'onnx-cuda'; it has executorch, onnx\."):
        load("pixel-8-8gb").rates("onnx-cuda", "int4")
    with pytest.raises(ProfileError, match="unknown weight type 'int3'; use one of int4"):
        load("pixel-8-8gb").rates("onnx", "int3")


@pytest.mark.parametrize(
    ("old", "new", "field", "fix"),
    [
        (RAM, "", "memory.ram_bytes is missing", 'add ram_bytes = { value = "8GB", source ='),
        ("[thermal]", "[termal]", "termal is not a field", 'did you mean "thermal"?'),
        ("floor_share ", "flor_share ", "thermal.flor_share is not a field", 'did you mean "floor_share"?'),
        ("[compute.onnx]", "[compute.onxx]", "compute.onxx is not a field", 'did you mean "onnx"?'),
        ("[compute.executorch.int8]", "[compute.executorch.int9]", "compute.executorch.int9 is not", '"int'),
        ('value = "7GB", conf', 'valeu = "7GB", conf', "app_limit_bytes.valeu is not a field", '"value"'),
        ("value = 0.05", "value = -0.05", "memory.headroom_share is -0.05", "must be 0 or more, at most 0.9"),
        ("value = 0.05", "value = nan", "memory.headroom_share is nan, not a number", "such as 0.1"),
        ("value = 0.05", "value = true", "memory.headroom_share is True, not a number", "such as 0.1"),
        ('"7GB"', '"seven"', 'app_limit_bytes is "seven", not a size above zero', 'such as "4GB"'),
        ('"7GB"', "[7]", "app_limit_bytes is [7], not a number", 'such as "4GB"'),
        ('"7GB"', "-7", "app_limit_bytes is -7", "must be above 0 (bytes)"),
        ('"7GB"', "7.5", "app_limit_bytes is 7.5, not a whole number", 'such as "4GB"'),
        ('"7GB"', '"9GB"', "app_limit_bytes is 8.4 GiB, above memory.ram_bytes (7.8 GiB)", "lower it"),
        ('"16KiB"', "5000", "memory.os_page_bytes is 5000, not a power of two", '"4KiB" or "16KiB"'),
        (RAM, 'ram_bytes = "8GB"', "memory.ram_bytes states no source", 'write ram_bytes = { value = "8GB", source'),
        (
            '"high", source = "MemTotal',
            '"measured", source = "MemTotal',
            "confidence is 'measured'",
            '"high" (measured',
        ),
        (', source = "MemTotal (sbc-bench)"', "", "memory.ram_bytes.source is missing", "say where"),
        ('"MemTotal (sbc-bench)"', '" "', "memory.ram_bytes.source is ' '", "say where"),
        ('kind = "board"', 'kind = "bord"', "kind is 'bord'", 'did you mean "board"?'),
        ('= "swap"', '= "swop"', "memory.kill is 'swop'", 'did you mean "swap"?'),
        ('name = "broken"', 'name = "other"', "name is 'other' in a file named broken.toml", "rename one"),
        ('name = "broken"', 'name = "Bro ken"', "name is 'Bro ken'", "lower-case"),
        ("title =", "titel =", "titel is not a field", 'did you mean "title"?'),
        ("[flash]", "[flash", "is not valid TOML", "line"),
    ],
)
def test_a_wrong_field_is_one_line_with_file_field_and_fix(
    write_profile: Callable[..., Path], old: str, new: str, field: str, fix: str
) -> None:
    path = write_profile((old, new))
    with pytest.raises(ProfileError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert field in message
    assert fix in message
    assert "\n" not in message


def test_a_profile_without_a_table_or_an_engine_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text('name = "empty"\ntitle = "Empty"\nkind = "board"\n', encoding="utf-8")
    with pytest.raises(ProfileError, match=r"\[compute\] is missing; add the table"):
        load(path)
    path.write_text('name = "empty"\ntitle = "Empty"\nkind = "board"\n[compute]\n', encoding="utf-8")
    with pytest.raises(ProfileError, match=r"compute has no engine; add a table \[compute.executorch\]"):
        load(path)
    path.write_text('memory = 8\nname = "empty"\n', encoding="utf-8")
    with pytest.raises(ProfileError, match=r"\[compute\] is missing"):
        load(path)
    path.write_bytes(b'name = "\xff"\n')
    with pytest.raises(ProfileError, match="is not valid TOML"):
        load(path)
