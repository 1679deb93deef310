"""Every command that edgekv prints can be typed: those of the documents, of the help, and those that a plan recommends."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from edgekv.cli.main import app, run_command_line
from edgekv.export import export_model
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What stands for something else, or needs what a test does not have.
PLACEHOLDER = re.compile(r"\b(BUNDLE|DIR|URL|FILE|NAME|COMMAND|PROFILE)\b|…")
ELSEWHERE = re.compile(r"s3://|tcp://|/data/|/mnt/|--jail|--install")
#: What takes some seconds.
LONG = ("long_prompt.txt", "--max-tokens 1000", "--prompt-tokens 2000")
#: Commands that end within a second on a tiny model.
QUICK = (
    "run",
    "plan",
    "inspect",
    "emulate",
    "profiles list",
    "profiles show",
    "profiles diff",
    "profiles validate",
    "stats",
)
BOARD = 'name = "{0}"\ntitle = "{0}"\nextends = "raspberry-pi-5-4gb"\n'
LIMIT = '[memory]\napp_limit_bytes = {{ value = "{0}", source = "a test", confidence = "high" }}\n'


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command of the tree with its name, groups included."""
    yield name, group
    for part, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{name} {part}".strip())


TREE = dict(commands(typer.main.get_command(app)))


def written(text: str) -> Iterator[str]:
    """Yield the commands of a text: in back quotes, and on lines of their own in blocks of code."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^(?:\$ )?(edgekv [a-z].*)$", "\n".join(blocks), flags=re.MULTILINE)
    lines += re.findall(r"^    (edgekv [a-z].*)$", prose, flags=re.MULTILINE)
    for found in [*re.findall(r"`(edgekv [^`]+)`", prose), *lines]:
        for command in re.sub(r"\s+#.*", "", found).replace("\n", " ").split("&&"):
            yield re.split(r" [|>] ", command.strip())[0]


def printed() -> list[str]:
    """Return every command of documents and help that has no placeholder in it."""
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    texts += [f"{command.epilog or ''}\n{command.help or ''}" for command in TREE.values()]
    found = {command for text in texts for command in written(text)}
    return sorted(command for command in found if not PLACEHOLDER.search(command))


def resolved(line: str) -> tuple[str, list[str]]:
    """Return the name of a command and its arguments."""
    words = shlex.split(line)[1:]
    name = ""
    while words and f"{name} {words[0]}".strip() in TREE:
        name, words = f"{name} {words[0]}".strip(), words[1:]
    return name, words


def is_mention(line: str) -> bool:
    """Say whether a sentence speaks of a command, or of one of its options, and not of a call."""
    return all(word.startswith("-") for word in resolved(line)[1])


def is_quick(line: str) -> bool:
    """Say whether a test can run a command."""
    return not is_mention(line) and resolved(line)[0] in QUICK and not ELSEWHERE.search(line)


def test_commands_are_found_where_they_are_printed() -> None:
    assert len(printed()) > 60
    text = "See `edgekv stats`:\n\n    edgekv run a -n 2   # why\n\n```\n$ edgekv plan b | jq .\nedgekv is\n```\nedgekv says\n"
    assert sorted(written(text)) == ["edgekv is", "edgekv plan b", "edgekv run a -n 2", "edgekv stats"]


@pytest.mark.parametrize("line", printed())
def test_a_printed_command_has_only_options_that_there_are(line: str) -> None:
    name, arguments = resolved(line)
    command = TREE[name]
    if is_mention(line):
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(arguments) <= known
    else:
        command.make_context(name, list(arguments)).close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documents speak of, each as small as it can be."""
    folder = tmp_path_factory.mktemp("world")
    # Many small layers: a quarter of a short context then holds a staging ring, as in the models that the documents speak of.
    shape = {"num_hidden_layers": 6, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 131072}
    for family, names in (("llama", ("Llama-3.2-1B", "Llama-3.2-3B")), ("qwen3", ("Qwen3-0.6B", "Qwen3-4B"))):
        for name in names:
            make_checkpoint(folder / name, family, **shape)
    export_model(folder / "Llama-3.2-1B", folder / "llama.edgekv", weights="fp32", page_size=16)
    export_model(folder / "Llama-3.2-1B", folder / "inline.edgekv", form="inline", weights="fp32", page_size=16)
    for name in ("demo.edgekv", "int4.edgekv", "qwen.edgekv"):
        shutil.copytree(folder / "llama.edgekv", folder / name)
    export_model("demo", folder / "demo-output" / "demo.edgekv", engine="onnx", weights="fp32")
    shutil.copy(folder / "Llama-3.2-1B" / "config.json", folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("book.txt", "system.txt", "my_documents.txt"):
        (folder / name).write_text("It was a dark night. " * 40, encoding="utf-8")
    (folder / "my-board.toml").write_text(BOARD.format("my-board"), encoding="utf-8")
    (folder / "tight.toml").write_text(BOARD.format("tight") + LIMIT.format("200MB"), encoding="utf-8")
    return folder


@pytest.fixture
def typed(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Return what types a command in that folder, one line on stdin, and gives back what it printed."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")

    def typed(words: list[str]) -> str:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
        code = run_command_line(words)
        out, err = capsys.readouterr()
        assert code == 0, f"edgekv {shlex.join(words)}: {err}"
        return out

    return typed


@pytest.mark.parametrize(
    "line",
    # test_cli.py reads the long prompt in every run.
    [
        pytest.param(line, marks=[pytest.mark.slow] if any(word in line for word in LONG) else [])
        for line in printed()
        if is_quick(line)
    ],
)
def test_a_printed_command_runs(line: str, typed: Callable[[list[str]], str]) -> None:
    name, arguments = resolved(line)
    if "--continue" in arguments:
        typed(["run", "llama.edgekv", "--session", "story.kv", "-p", "Once", "-n", "3"])
    if name == "stats":
        typed(["run", "llama.edgekv", "--session", "chat.kv", "-p", "Once", "-n", "40"])
    typed([*name.split(), *arguments])


@pytest.mark.parametrize(
    ("source", "context", "profile"),
    [
        *(("llama.edgekv", context, "raspberry-pi-5-8gb") for context in (64, 256)),
        ("llama.edgekv", 32768, "tight.toml"),
        *(
            pytest.param(source, 32768, "tight.toml", marks=pytest.mark.slow)
            for source in ("inline.edgekv", "Llama-3.2-1B")
        ),
        pytest.param("inline.edgekv", 256, "raspberry-pi-5-8gb", marks=pytest.mark.slow),
        ("config.json", 4096, "galaxy-s24-8gb"),
    ],
)
def test_what_a_plan_recommends_can_be_typed(
    source: str, context: int, profile: str, typed: Callable[[list[str]], str], world: Path
) -> None:
    data = json.loads(typed(["plan", source, "--profile", profile, "--context", str(context), "--json"]))
    lines = data["advice"]["commands"]
    assert lines
    for line in lines:
        name, arguments = resolved(line)
        TREE[name].make_context(name, list(arguments)).close()
        if name == "export":
            assert source != arguments[0] or (world / source).is_dir()
            continue
        bundle = arguments[0] if (world / arguments[0]).exists() else "llama.edgekv"
        said = json.loads(typed([name, bundle, *arguments[1:], "--json"]).splitlines()[-1])
        assert said["finish_reason"] in ("length", "stop")
