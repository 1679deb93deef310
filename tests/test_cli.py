"""The command line as people and scripts meet it: streams, exit codes, one clear line for each mistake."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edgekv
from edgekv.cli.main import run_command_line
from edgekv.model_config import ARCHITECTURES, TEXT_PARTS
from edgekv.runtime.build import describe_build
from edgekv.runtime.kernels.choose import load_kernels
from edgekv.runtime.pages.budget import RUNTIME_OVERHEAD_BYTES
from edgekv.runtime.storage.flash import FlashStore
from edgekv.spec import PageSpec

Bundle = Callable[..., Path]
LONG = ["--prompt-file", str(Path(__file__).resolve().parent.parent / "examples" / "long_prompt.txt")]


def cli(
    *arguments: str | Path, stdin: str | None = None, file_limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    def limit_files() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

    return subprocess.run(
        [sys.executable, "-m", "edgekv", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_files if file_limit is not None else None,
        env={**os.environ, "COLUMNS": "200"},
    )


def here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, where a test needs none of its own: the start of one takes longer than most mistakes."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run_command_line([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Assert one clear line on stderr, nothing on stdout, no traceback, and the exit code."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("edgekv: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def test_where_the_statistics_cannot_go_is_said_before_the_run(bundle: Bundle, tmp_path: Path) -> None:
    result = cli("run", bundle("demo"), "--prompt", "It was", "-n", "4", "--stats", tmp_path / "gone" / "stats.json")
    refused(result, 2, "--stats", "is no folder that can be written to")


def test_text_goes_to_stdout_and_everything_else_to_stderr(bundle: Bundle) -> None:
    result = cli("run", bundle("demo"), "--prompt", "It was a dark night", "-n", "12")
    assert result.returncode == 0
    assert result.stdout.strip()
    assert "tokens" not in result.stdout
    for word in ("prompt", "generated", "peak memory", "keys and values", "pages"):
        assert word in result.stderr


def test_json_holds_the_text_and_the_numbers(bundle: Bundle) -> None:
    plain = cli("run", bundle("demo"), "--prompt", "It was a dark night", "-n", "12", "--quiet")
    result = json.loads(cli("run", bundle("demo"), "--prompt", "It was a dark night", "-n", "12", "--json").stdout)
    assert result["text"] == plain.stdout[:-1]
    assert result["peak_rss_bytes"] > 0
    assert result["decode_tokens"] == 11
    assert set(result["cache"]["bytes_by_tier"]) == {"HOT", "WARM", "COLD", "REMOTE", "DROPPED"}


def test_a_quarter_of_the_memory_gives_the_same_text_from_a_prompt_of_two_thousand_tokens(bundle: Bundle) -> None:
    roomy = json.loads(cli("run", bundle("demo"), *LONG, "-n", "48", "--kv", "int8", "--json").stdout)
    tight = json.loads(cli("run", bundle("demo"), *LONG, "-n", "48", "--kv-budget", "25%", "--json").stdout)
    assert roomy["prefill_tokens"] > 2000
    assert tight["text"] == roomy["text"]
    assert tight["pages"]["pages_offloaded"] > 0
    assert tight["pages"]["pages_fetched"] > 0
    assert tight["cache"]["budget_bytes"] * 4 <= 1.01 * (roomy["prefill_tokens"] + 48) * 2048 + 4096


@pytest.mark.parametrize("n_tokens", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_peak_memory_stays_within_weights_budget_and_the_overhead_that_the_readme_states(
    n_tokens: int, bundle: Bundle, tmp_path: Path
) -> None:
    words = Path(LONG[1]).read_text(encoding="utf-8").split()
    text = " ".join((words * 4)[: n_tokens // 2])  # about two tokens to a word
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text, encoding="utf-8")
    folder = bundle("demo")
    weights = sum(path.stat().st_size for path in folder.iterdir())
    result = json.loads(cli("run", folder, "--prompt-file", prompt, "-n", "8", "--kv-budget", "1MiB", "--json").stdout)
    assert 0.9 * n_tokens <= result["prefill_tokens"] <= 1.3 * n_tokens
    assert result["peak_rss_bytes"] <= weights + 2**20 + RUNTIME_OVERHEAD_BYTES


def test_a_conversation_keeps_what_it_has_computed(bundle: Bundle) -> None:
    result = cli("run", bundle("demo"), "--chat", "--json", "-n", "8", stdin="Call me Ishmael.\n\nWho am I?\n")
    assert result.returncode == 0, result.stderr
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] > 10


def test_a_profile_sets_the_budget_and_says_how(bundle: Bundle) -> None:
    result = cli("run", bundle("demo"), "--profile", "raspberry-pi-5-8gb", "--prompt", "It was", "-n", "4")
    assert result.returncode == 0
    assert "raspberry-pi-5-8gb: app limit" in result.stderr
    assert "= KV cache" in result.stderr


def test_the_version_names_the_build_in_one_line() -> None:
    line = cli("--version").stdout
    assert line.startswith(f"edgekv {edgekv.__version__} (commit ")
    assert line.endswith(")\n")
    assert line.count("\n") == 1
    if (processor := load_kernels().build()["processor"]) and platform.machine() in ("x86_64", "aarch64"):
        assert processor == platform.machine()
        for isa in load_kernels().available_isas():
            assert isa == "scalar" or isa in line


def test_the_version_of_a_build_without_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekv.runtime.build.load_kernels", lambda: load_kernels("numpy"))
    assert "NumPy's, since it was built without a C++ compiler" in describe_build()


def test_help_is_there() -> None:
    for command in ("run", "export", "inspect", "profiles"):
        result = here(command, "--help")
        assert result.returncode == 0
        assert f"edgekv {command}" in result.stdout


def test_the_reader_of_the_output_may_go_away(bundle: Bundle) -> None:
    command = f"{sys.executable} -m edgekv run {bundle('demo')} --prompt 'It was' -n 64 | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["give one of --prompt"]),
        (["--prompt", "a", "--chat"], ["not --prompt and --chat"]),
        (["--prompt", "a", "--kv-budget", "1MiB", "--profile", "laptop-16gb"], ["not both"]),
        (["--prompt", "a", "--kv-budget", "lots"], ["--kv-budget must be a size", "not 'lots'", "64MiB"]),
        (["--prompt", "a", "--kv-budget", "x%"], ["--kv-budget must be", "a share", "not 'x%'"]),
        (["--prompt", "a", "--top-p", "2"], ["--top-p must be"]),
        (["--prompt", "a", "--policy", "fifo"], ["--policy must be one of lru", "not 'fifo'"]),
        (["--prompt", "a", "--profile", "toaster"], ["toaster"]),
        (["--prompt", "a", "--context", "99999"], ["99999", "8192"]),
        (["--prompt", "word " * 300, "--context", "100"], ["does not fit the context of 100", "--context"]),
        (["--prompt", "word " * 300, "--kv-budget", "4KiB"], ["too small", "raise --kv-budget"]),
        (["--prompt-file", "/nowhere/at/all"], ["cannot read --prompt-file /nowhere/at/all"]),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], bundle: Bundle
) -> None:
    refused(here("run", bundle("demo"), *arguments), 2, *words)


def damaged(bundle: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    copy = folder / "copy.edgekv"
    shutil.copytree(bundle, copy)
    change(copy)
    return copy


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: flip(folder / "weights.bin"), ["weights.bin differs from its sha256", "export it again"]),
        (lambda folder: os.truncate(folder / "weights.bin", 1000), ["weights.bin has 1000 bytes"]),
        (lambda folder: (folder / "segment_1.onnx").unlink(), ["segment_1.onnx is missing"]),
        (lambda folder: edit_manifest(folder, format_version=99), ["bundle format 99", "upgrade edgekv"]),
        (lambda folder: edit_manifest(folder, model={}), ["manifest.json is damaged"]),
        (lambda folder: (folder / "manifest.json").write_text("{"), ["manifest.json is damaged"]),
        (lambda folder: (folder / "manifest.json").unlink(), ["is not a bundle", "edgekv export"]),
    ],
)
def test_a_damaged_bundle_is_refused_by_name(
    change: Callable[[Path], object], words: list[str], bundle: Bundle, tmp_path: Path
) -> None:
    refused(here("run", damaged(bundle("demo"), tmp_path, change), "--prompt", "a"), 2, *words)


def test_a_profile_with_a_bad_number_names_file_and_field(bundle: Bundle, tmp_path: Path) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text(
        'name = "mine"\ntitle = "Mine"\nextends = "laptop-16gb"\n'
        '[memory]\napp_limit_bytes = {value = -1, source = "x", confidence = "low"}\n'
    )
    refused(cli("run", bundle("demo"), "--prompt", "a", "--profile", profile), 2, "mine.toml", "app_limit_bytes")


def test_an_offload_folder_that_cannot_be_written_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("run", bundle("demo"), *LONG, "--kv-budget", "25%", "--offload", tmp_path / "file")
    refused(result, 1, f"cannot write the offload folder {tmp_path / 'file'}", "--offload DIR")


def test_an_offload_folder_that_fills_up_is_one_line_and_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    result = cli("run", bundle("demo"), *LONG, "--kv-budget", "25%", "--offload", tmp_path, file_limit=200_000)
    refused(result, 1, f"the offload folder {tmp_path} is full", "free some space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "wear.jsonl"]


def test_a_second_process_on_an_offload_folder_is_turned_away(bundle: Bundle, tmp_path: Path) -> None:
    store = FlashStore(tmp_path, PageSpec(1, 1, 32, 16))
    result = cli("run", bundle("demo"), *LONG, "--kv-budget", "25%", "--offload", tmp_path)
    store.close()
    refused(result, 2, "another process uses the offload folder", "--offload DIR")


def test_a_checkpoint_that_cannot_be_exported_leaves_nothing_behind(tmp_path: Path) -> None:
    source, out = tmp_path / "checkpoint", tmp_path / "out.edgekv"
    source.mkdir()
    refused(cli("export", source, "--out", out), 2, "config.json")
    (source / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    refused(here("export", source, "--out", out), 2, "mamba", "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_export_refuses_is_neither_planned_nor_emulated(tmp_path: Path) -> None:
    kind = "gemma3n"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": kind, "text_config": {"model_type": f"{kind}_text"}}))
    options = ("--profile", "raspberry-pi-5-8gb", "--context", "4096")
    said = [
        here("export", tmp_path, "--out", tmp_path / "out.edgekv"),
        here("plan", config, *options),
        here("emulate", config, *options),
        here(
            "sweep", config, "--profiles", "raspberry-pi-5-8gb", "--contexts", "4096", "--out", tmp_path / "sweep.csv"
        ),
    ]
    for result in said:
        refused(
            result,
            2,
            f"unknown architecture '{kind}'",
            f"edgekv exports {', '.join([*ARCHITECTURES, *TEXT_PARTS])}",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
