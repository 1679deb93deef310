"""A program in C++ that knows edgekv by its documents has the bits of `edgekv run`; each continues the sessions of the other.

What differs by nature is not compared: when a session was made, which records of a segment hold its pages, and what lies in
slots of the open page that no token has reached.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from session_files import Session, read_session
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from edgekv.cli.main import app
from edgekv.export import export_model
from edgekv.runtime.engines.executorch.build import package_folder
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from tests.checkpoints import make_checkpoint
from tests.conftest import Once

ROOT = Path(__file__).parents[2]
#: Where the program of an engine lies: what they share lies with the one for ONNX Runtime.
SOURCES = {
    engine: ROOT / "examples" / f"inline_{name}" for engine, name in (("onnx", "onnxruntime"), ("executorch",) * 2)
}
TEXT = (ROOT / "examples" / "long_prompt.txt").read_text(encoding="utf-8")
#: Engine, source, weights, page size, and how many characters of TEXT a token of its tokenizer stands for.
CASES: dict[str, tuple[str, str, str, int, float]] = {
    "demo": ("onnx", "demo", "fp32", 32, 2.7),
    "demo, small pages": ("onnx", "demo", "fp32", 16, 2.7),
    "demo, int4": ("onnx", "demo", "int4", 32, 2.7),
    "window": ("onnx", "window", "fp32", 16, 1.2),
    "qk-norm": ("onnx", "qk-norm", "fp32", 16, 1.2),
    "many heads": ("onnx", "many heads", "fp32", 16, 1.2),
    "executorch, demo": ("executorch", "demo", "fp32", 32, 2.7),
    "executorch, demo, small pages": ("executorch", "demo", "fp32", 16, 2.7),
    "executorch, demo, int4": ("executorch", "demo", "int4", 32, 2.7),
    "executorch, one layer": ("executorch", "one layer", "fp32", 16, 1.2),
    "executorch, window": ("executorch", "window", "fp32", 16, 1.2),
    "executorch, qk-norm": ("executorch", "qk-norm", "fp32", 16, 1.2),
}
pytestmark = pytest.mark.slow  # a C++ program is compiled, and bundles are exported for it
Run = Callable[..., dict[str, Any]]
Bundle = Callable[..., Path]


def cases(*names: str, always: Collection[str], mark: pytest.MarkDecorator = pytest.mark.slow) -> pytest.MarkDecorator:
    """Parametrise a test with these cases, those with ``mark`` that are not in ``always``.

    Those of ExecuTorch take a minute or two to export: CI drives one of them.
    """

    def marks(name: str) -> list[pytest.MarkDecorator]:
        if not name.startswith("executorch"):
            return [] if name in always else [mark]
        return [pytest.mark.slow if name == "executorch, one layer" else pytest.mark.exhaustive]

    return pytest.mark.parametrize("case", [pytest.param(name, marks=marks(name)) for name in names])


def build_onnx(folder: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder.mkdir()
    sources = sorted(map(str, SOURCES["onnx"].glob("*.cpp")))
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", *sources, "-ldl", "-pthread"]
    subprocess.run([*command, "-o", str(folder / "driver")], check=True)


def build_executorch(folder: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    options = [f"-DEXECUTORCH={package_folder()}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    subprocess.run(["cmake", "-S", str(SOURCES["executorch"]), "-B", str(folder), *options], check=True)
    subprocess.run(["cmake", "--build", str(folder), "--parallel", "2"], check=True)


BUILDERS = {"onnx": build_onnx, "executorch": build_executorch}


@pytest.fixture(scope="session")
def driver(once: Once) -> Run:
    """Return a function that runs the program of a bundle's engine."""
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.*")
    environment = {**os.environ, "ONNXRUNTIME_LIBRARY": str(library)}

    def call(bundle: Path, *arguments: str) -> dict[str, Any]:
        engine = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["engine"]
        program = once(f"driver-{engine}", BUILDERS[engine]) / "driver"
        # edgekv gets two threads here: bits do not depend on their number.
        command = [str(program), str(bundle), "--json", "--threads", "1", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    return call


@pytest.fixture(scope="session")
def model(bundle: Bundle, once: Once) -> Callable[[str], Path]:
    """Return a function that exports a case."""

    def make(folder: Path, source: str) -> None:
        if source in ("window", "one layer"):
            layers, context = (3, 4096) if source == "window" else (1, 512)
            make_checkpoint(
                folder, "mistral", std=0.04, sliding_window=24, num_hidden_layers=layers, max_position_embeddings=context
            )  # fmt: skip
            put_tokens_around_prompts(folder / "tokenizer.json")
        else:
            heads = 48 if source == "many heads" else 4
            make_checkpoint(folder, "qwen3", std=0.04, num_attention_heads=heads, max_position_embeddings=4096)

    def get(case: str) -> Path:
        engine, source, weights, page_size, _ = CASES[case]
        if engine == "executorch":
            pytest.importorskip("executorch.exir", reason="the extra `executorch` is not installed")
            pytest.importorskip("torchao", reason="the extra `executorch` is not installed")
        folder = source if source == "demo" else once(f"driven-{source}", lambda folder: make(folder, source))
        return bundle(folder, "inline", weights, page_size, engine)

    return get


def put_tokens_around_prompts(path: Path) -> None:
    """Let a tokenizer begin and end its texts with a special token, as many do."""
    tokenizer = Tokenizer.from_file(str(path))
    names = ("<|begin|>", "<|user|>")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{names[0]} $A {names[1]}", special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    tokenizer.save(str(path))


def edgekv_run(bundle: Path, session: Path, *arguments: str) -> None:
    """Let `edgekv run` do something with a session."""
    command = ["run", str(bundle), "--raw", "--session", str(session), "--threads", "2", "-q", *arguments]
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    if (manifest["engine"], manifest["weights"]) == ("onnx", "int4"):
        # Products with int4 weights are the engine's own only where edgekv has no kernels for them.
        environment = {**os.environ, "EDGEKV_ISA": "scalar"}
        subprocess.run([sys.executable, "-m", "edgekv", *command], check=True, capture_output=True, env=environment)
    else:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output


def same(mine: Path, theirs: Path) -> Session:
    """Check that two sessions hold the same bits; returns the first."""
    one, other = read_session(mine), read_session(theirs)
    for name in ("key", "shape", "tokens", "n_kv", "steps", "pruned", "notes"):
        assert getattr(one, name) == getattr(other, name), name
    for number, (ours, their) in enumerate(zip(one.pages, other.pages, strict=True)):
        assert [page.pack() for page in ours] == [page.pack() for page in their], f"page {number}"
    filled = one.n_kv % one.shape.page_size
    for a, b in ((one.open_keys, other.open_keys), (one.open_values, other.open_values)):
        assert (a is None) == (b is None)
        assert a is None or b is None or a[:, :, :filled].tobytes() == b[:, :, :filled].tobytes()
    return one


def copy(session: Path, name: str) -> Path:
    return Path(shutil.copytree(session, session.parent / name, symlinks=True))


def compare(case: str, tokens: int, answer: int, folder: Path, driver: Run, tmp_path: Path) -> None:
    """Let both begin a session of ``tokens`` tokens or more, and each continue that of the other."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    prompt = TEXT[: int((tokens - answer) * CASES[case][-1]) + 40]
    said = driver(folder, "--prompt", prompt, "-n", str(answer), "--session", str(mine))
    edgekv_run(folder, theirs, "-p", prompt, "-n", str(answer))
    session = same(mine, theirs)
    assert session.tokens == said["prompt"] + said["tokens"]
    assert len(session.tokens) >= tokens
    assert len(session.pages) == session.n_kv // CASES[case][3]

    crossed = copy(mine, "crossed")
    more = " But nobody knew, and"
    assert (
        driver(folder, "--session", str(theirs), "--continue", "--prompt", more, "-n", "20")["reused_tokens"]
        == session.n_kv
    )
    edgekv_run(folder, crossed, "--continue", "-p", more, "-n", "20")
    same(theirs, crossed)
    driver(folder, "--session", str(crossed), "--continue", "-n", "20")
    edgekv_run(folder, theirs, "--continue", "-n", "20")
    same(theirs, crossed)


@cases(*CASES, always=("demo", "window"))
def test_tokens_pages_and_sessions_are_those_of_edgekv_run(
    case: str, model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    compare(case, 300, 40, model(case), driver, tmp_path)


@cases(
    *[name for name in CASES if name != "executorch, one layer"],  # whose context is short
    always=("demo", "window"),
    mark=pytest.mark.exhaustive,
)
def test_two_thousand_tokens_are_those_of_edgekv_run(
    case: str, model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    compare(case, 2000, 300, model(case), driver, tmp_path)


def begin(folder: Path, session: Path, prompt: list[int], pruned: list[range], answer: int) -> list[int]:
    """Let edgekv compute a prompt, prune, and compute an answer greedily, all of which gets keys and values."""
    options = RunOptions(threads=2, session=SessionOptions(session), prefixes=False)
    tokens: list[int] = []
    with Generator.open(folder, options) as generator:
        logits = generator.prefill(prompt, max_tokens=answer + 1)
        if pruned:
            assert generator.cache is not None
            generator.cache.prune(np.concatenate([np.array(span) for span in pruned]))
        for _ in range(answer):
            tokens.append(int(np.argmax(logits)))
            logits = generator.step(tokens[-1:])
        generator.save(whole=True)
    return tokens


def ranges(spans: list[range]) -> str:
    return ",".join(f"{span.start}:{span.stop}" for span in spans)


@cases("window", "qk-norm", "executorch, window", "executorch, qk-norm", always=("window",))
@pytest.mark.parametrize(
    "pruned",
    [
        pytest.param([range(3, 20), range(40, 90)], id="whole pages and parts"),
        pytest.param([range(288, 300)], id="the open page"),
        pytest.param([range(20, 33), range(280, 298)], id="up to the open page"),
        pytest.param([range(300)], id="everything"),
    ],
)
def test_pruned_tokens_are_seen_by_nobody_and_stay_pruned(
    pruned: list[range], case: str, model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    folder, mine, theirs = model(case), tmp_path / "mine", tmp_path / "theirs"
    prompt = np.random.default_rng(0).integers(0, 250, 300).tolist()
    listed = ["--tokens", ",".join(map(str, prompt))]
    said = driver(folder, *listed, "--prune", ranges(pruned), "-n", "25", "--session", str(mine))
    tokens = begin(folder, theirs, prompt, pruned, 24)
    assert said["tokens"][:24] == tokens

    # The session of the driver has one token more, the last one: it has no keys and values yet.
    one, other = read_session(mine), read_session(theirs)
    assert one.tokens == [*other.tokens, said["tokens"][-1]]
    assert (one.n_kv, one.pruned, one.steps) == (other.n_kv, other.pruned, other.steps)
    assert [[page.pack() for page in page_of] for page_of in one.pages] == [
        [page.pack() for page in page_of] for page_of in other.pages
    ]
    crossed = copy(theirs, "crossed")
    edgekv_run(folder, theirs, "--continue", "-n", "20")
    driver(folder, "--session", str(crossed), "--continue", "-n", "20")
    same(crossed, theirs)
    crossed = copy(mine, "crossed back")
    edgekv_run(folder, crossed, "--continue", "-n", "20", "-p", " and on")
    driver(folder, "--session", str(mine), "--continue", "-n", "20", "--prompt", " and on")
    same(mine, crossed)


@cases("qk-norm", "executorch, qk-norm", always=("qk-norm",))
@pytest.mark.parametrize(
    "pruned",
    [
        pytest.param([], marks=pytest.mark.slow),
        [range(3, 20), range(250, 290)],
        pytest.param([range(290, 300)], marks=pytest.mark.slow),
    ],
    ids=ranges,
)
def test_a_session_whose_last_token_is_known_is_computed_again_from_where_a_step_began(
    pruned: list[range], case: str, model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    folder, theirs = model(case), tmp_path / "theirs"
    begin(folder, theirs, np.random.default_rng(1).integers(0, 250, 300).tolist(), pruned, 0)
    mine = copy(theirs, "mine")
    edgekv_run(folder, theirs, "--continue", "-n", "20")
    assert driver(folder, "--session", str(mine), "--continue", "-n", "20")["reused_tokens"] == 256
    same(mine, theirs)


@cases("qk-norm", "executorch, qk-norm", always=("qk-norm",))
@pytest.mark.parametrize("more", [pytest.param("", marks=pytest.mark.slow), " and then"])
def test_a_session_without_its_open_page_is_resumed_as_edgekv_does_it(
    more: str, case: str, model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    folder, prompt = model(case), np.random.default_rng(2).integers(0, 250, 300).tolist()
    options = RunOptions(threads=2, session=SessionOptions(tmp_path / "running"), prefixes=False)
    with Generator.open(folder, options) as generator:
        generator.prefill(prompt, max_tokens=8)
        for token in (5, 6, 7):
            generator.step([token])
        generator.save()
        mine, theirs = copy(tmp_path / "running", "mine"), copy(tmp_path / "running", "theirs")  # as after a kill
    assert read_session(mine).open_keys is None
    added = ["-n", "20", *(["--prompt", more] if more else [])]
    driver(folder, "--session", str(mine), "--continue", *added)
    edgekv_run(folder, theirs, "--continue", *added)
    same(mine, theirs)


@cases("qk-norm", "executorch, qk-norm", always=("qk-norm",))
def test_another_prompt_takes_what_it_shares_with_the_session(
    case: str, model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    folder, first = model(case), tmp_path / "first"
    driver(folder, "--prompt", TEXT[:400], "-n", "20", "--session", str(first))
    for number, prompt in enumerate((TEXT[:350] + " no!", TEXT[:400] + " yes!", TEXT[:100], "Not at all like it")):
        mine, theirs = copy(first, f"mine {number}"), copy(first, f"theirs {number}")
        driver(folder, "--prompt", prompt, "-n", "20", "--session", str(mine))
        edgekv_run(folder, theirs, "-p", prompt, "-n", "20")
        same(mine, theirs)


@pytest.mark.parametrize("case", ["demo, small pages", "window"])
def test_texts_have_the_tokens_of_the_tokenizers_library(case: str, model: Callable[[str], Path], driver: Run) -> None:
    folder = model(case)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (
        "Hello caf\u00e9 \u6771\u4eac it's 12 o'clock",
        "a  b\n\n c\t",
        "\u041f\u0440\u0438\u0432\u0435\u0442, x\u00b2 \u00bd \u0663\u0664",
        "<s>hi</s> <|end|>there",
        "we'll they've I'M",
        "   x",
        "\U0001f60e 1234 56 \u00a0 z",
    )
    for text in texts:
        said = driver(folder, "--prompt", text, "-n", "0")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert said["prompt"] == [*manifest["prompt_begin"], *ids, *manifest["prompt_end"]]
    assert driver(folder, "--prompt", "", "-n", "0")["prompt"] == [manifest["model"]["bos_token_id"]]


def test_it_says_what_is_damaged_and_what_does_not_fit(
    model: Callable[[str], Path], driver: Run, tmp_path: Path
) -> None:
    folder, session = model("qk-norm"), tmp_path / "session"
    driver(folder, "--prompt", TEXT[:100], "-n", "20", "--session", str(session))
    with pytest.raises(RuntimeError, match="is of another bundle: checkpoint is"):
        driver(model("window"), "--continue", "--session", str(session))
    segment = session / "pages-00000001.bin"
    damaged = bytearray(segment.read_bytes())
    damaged[500] ^= 1
    segment.write_bytes(damaged)
    with pytest.raises(RuntimeError, match="the record of page 0 is damaged"):
        driver(folder, "--continue", "--session", str(session))


def test_a_bundle_for_other_bindings_is_refused(driver: Run, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "checkpoint", "qwen3", num_hidden_layers=1)
    export_model(source, tmp_path / "portable", form="inline", engine="onnx", io="portable", calibration="none")
    with pytest.raises(RuntimeError, match=r"^driver: .*this program hands over float16: .*--io compact\n$"):
        driver(tmp_path / "portable", "--prompt", "x", "-n", "1")


def test_a_bundle_of_another_form_is_refused(bundle: Bundle, driver: Run) -> None:
    with pytest.raises(RuntimeError, match=r"^driver: .*no bundle for this program: .*--form inline --engine onnx\n$"):
        driver(bundle("demo"), "--prompt", "x", "-n", "1")


def test_an_encrypted_session_is_refused(model: Callable[[str], Path], driver: Run, tmp_path: Path) -> None:
    folder = model("qk-norm")
    options = RunOptions(threads=2, session=SessionOptions(tmp_path / "secret", secret=b"k" * 16), prefixes=False)
    with Generator.open(folder, options) as generator:
        generator.prefill([1, 2, 3], max_tokens=1)
    for arguments in (["--continue"], ["--prompt", "x"]):
        with pytest.raises(RuntimeError, match=r"^driver: .*/secret is encrypted, .*edgekv run has the key\n$"):
            driver(folder, "--session", str(tmp_path / "secret"), "-n", "1", *arguments)


def test_a_session_of_format_1_is_refused(model: Callable[[str], Path], driver: Run, tmp_path: Path) -> None:
    session = shutil.copytree(ROOT / "tests" / "data" / "session-1", tmp_path / "old")
    with pytest.raises(RuntimeError, match=r"^driver: .*/old has format 1, and this program knows 2: edgekv run .*\n$"):
        driver(model("qk-norm"), "--session", str(session), "--continue", "-n", "1")


@pytest.mark.parametrize("engine", SOURCES)
def test_it_includes_nothing_of_ours(engine: str) -> None:
    shared = [*SOURCES["onnx"].glob("*.h"), *SOURCES["onnx"].glob("*.cpp")]
    files = shared if engine == "onnx" else list(SOURCES[engine].glob("*.cpp"))
    included = {name for file in files for name in re.findall(r'#include "(.*)"', file.read_text(encoding="utf-8"))}
    assert included <= {file.name for file in shared}
    system = {name for file in files for name in re.findall(r"#include <(.*)>", file.read_text(encoding="utf-8"))}
    system = {name for name in system if "." in name or "/" in name}
    if engine == "onnx":
        assert system == {"dlfcn.h", "fcntl.h", "sys/file.h", "sys/stat.h", "unistd.h"}
    else:
        assert {name for name in system if not name.startswith("executorch/")} == {"sys/mman.h"}
