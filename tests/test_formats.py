"""Every file format with a fault in it gives what the file says, or one error of our own in one line: never a traceback,
never a value out of range, never memory for a number that somebody made up."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from edgekv.bundle import check_files, read_manifest
from edgekv.cli.chat import remembered
from edgekv.device_profiles import catalog
from edgekv.device_profiles import load as load_profile
from edgekv.device_profiles.schema import Quantity
from edgekv.emulator.play.scenario import load_scenario
from edgekv.errors import BundleError, EdgeKVError
from edgekv.export.choose_engine import parse_measurements
from edgekv.runtime.generate import Generator, RunOptions
from edgekv.runtime.options import SessionOptions
from edgekv.runtime.sessions.index import BACKUP, FORMAT, INDEX, row_check
from edgekv.runtime.sessions.tools import contents, describe, verify
from edgekv.runtime.storage.wear import LEDGER, read_ledger
from edgekv.verify.gate import parse_gate
from tests.cases import seldom
from tests.mutation import faulty, faulty_bytes, faulty_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).parent / "data"
MANIFEST: dict[str, Any] = json.loads((DATA / "bundle-1" / "manifest.json").read_text(encoding="utf-8"))
Case = TypeVar("Case")
Result = TypeVar("Result")


def examples(quick: int, long: int) -> pytest.MarkDecorator:
    """Run a test with few examples in the default suite, and with many among the slow ones."""
    return pytest.mark.parametrize("count", [quick, pytest.param(long, marks=pytest.mark.exhaustive)])


def for_all(count: int, cases: SearchStrategy[Case], check: Callable[[Case], None]) -> None:
    """Check ``count`` cases."""
    unbothered = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    unbothered(given(cases)(lambda case: check(case)))()


def unless_refused(action: Callable[[], Result]) -> Result | None:
    """Return what an action gives; None if it was refused with one error of our own, which is one line."""
    try:
        return action()
    except EdgeKVError as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said
    return None


def says(value: Any, document: Any) -> bool:
    """Tell whether a value is what a document says, but for keys that the document leaves out."""
    if isinstance(value, dict) and isinstance(document, dict):
        return all(key in value and says(value[key], document[key]) for key in document)
    if isinstance(value, (list, tuple)):
        return len(value) == len(document) and all(map(says, value, document))
    if isinstance(value, float):
        return value == float(document)
    return type(value) is type(document) and bool(value == document)


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a small bundle."""
    return Path(shutil.copytree(DATA / "bundle-1", tmp_path / "model.edgekv"))


@examples(250, 5000)
def test_a_manifest_with_a_fault_says_what_it_says_or_is_refused(folder: Path, count: int) -> None:
    def check(document: bytes) -> None:
        (folder / "manifest.json").write_bytes(document)
        manifest = unless_refused(lambda: read_manifest(folder))
        if manifest is not None:
            assert says(manifest.to_json(), json.loads(document))
            assert 0 < manifest.model.n_layers == len(manifest.model.windows)

    for_all(count, faulty_json({**MANIFEST, "special_tokens": {"bos_token": "<|begin|>"}}), check)


def generates_or_is_refused(folder: Path, count: int) -> None:
    """What gets past the manifest is held against the graphs, before a buffer is made for it."""
    whole = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))

    def generate() -> list[int]:
        with Generator.open(folder, RunOptions(threads=1, prefixes=False)) as generator:
            return list(generator.tokens(list(range(20)), max_tokens=3))

    def check(manifest: Any) -> None:
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        tokens = unless_refused(generate)
        assert tokens is None or all(0 <= token < whole["model"]["vocab_size"] for token in tokens)

    generate()
    before = peak_rss_bytes()
    for_all(count, faulty(whole), check)
    assert peak_rss_bytes() - before < 512 << 20


@examples(40, 2000)
def test_a_bundle_with_a_fault_in_its_manifest_generates_or_is_refused(folder: Path, count: int) -> None:
    generates_or_is_refused(folder, count)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "form"), [("onnx", "inline"), ("executorch", "split"), ("executorch", "inline")])
def test_a_bundle_of_another_kind_with_a_fault_in_its_manifest_generates_or_is_refused(
    engine: str, form: str, bundle: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    if engine == "executorch":
        pytest.importorskip("executorch")
    made = bundle(checkpoint("llama"), form, engine=engine)
    generates_or_is_refused(Path(shutil.copytree(made, tmp_path / "model.edgekv")), 400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 10**12}, "model.n_layers is 1000000000000; it must be a whole number <= 2147483648"),
        ({"n_layers": 2**30}, "model.windows has 2 entries for 1073741824 layers"),
        ({"vocab_size": 2**30}, "the embedding needs"),
        ({"hidden_size": 2**20}, "the embedding needs"),
        ({"n_kv_heads": 3}, "model.n_q_heads (4) is no multiple of n_kv_heads (3)"),
        ({"head_dim": "16"}, "model.head_dim is '16'; it must be a whole number"),
        ({"softmax_scale": -1}, "model.softmax_scale is -1; it must be a number > 0"),
        ({"windows": [0, -1]}, "model.windows 2 is -1; it must be a whole number >= 0"),
        ({"n_layer": 2}, 'model.n_layer is not a field; did you mean "n_layers"?'),
    ],
)
def test_a_number_that_cannot_be_is_refused_in_one_line(folder: Path, change: dict[str, Any], message: str) -> None:
    manifest = {**MANIFEST, "model": {**MANIFEST["model"], **change}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        read_manifest(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "", "a\0b", "a\\b", "C:x", "x" * 300])
@pytest.mark.parametrize("field", ["chat_template", "graphs", "embedding", "files"])
def test_no_name_in_a_manifest_leads_out_of_the_bundle(folder: Path, field: str, name: str) -> None:
    value = {
        "chat_template": name,
        "graphs": [name, *MANIFEST["graphs"][1:]],
        "embedding": {**MANIFEST["embedding"], "file": name},
        "files": {**MANIFEST["files"], name: {"bytes": 1, "sha256": ""}},
    }[field]
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, field: value}), encoding="utf-8")
    with pytest.raises(BundleError, match="not the plain name of a file in the folder"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["weights.bin", "tokenizer.json", "chat_template.jinja", "manifest.json"])
def test_a_link_in_a_bundle_may_lead_to_its_neighbour_and_nowhere_else(folder: Path, name: str, tmp_path: Path) -> None:
    beside = folder / "other"
    (folder / name).rename(beside)
    (folder / name).symlink_to("other")
    check_files(folder, read_manifest(folder))
    beside.rename(tmp_path / "elsewhere")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link that leads out of the folder"):
        check_files(folder, read_manifest(folder))


def test_a_folder_a_pipe_or_a_huge_file_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    for name, words in (("weights.bin", "weights.bin is no file"), ("manifest.json", "is not a bundle")):
        kept = (folder / name).read_bytes()
        for make in (os.mkdir, os.mkfifo):
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(BundleError, match=words):
                check_files(folder, read_manifest(folder))
            (os.rmdir if (folder / name).is_dir() else os.unlink)(folder / name)
            (folder / name).write_bytes(kept)
    with (folder / "manifest.json").open("r+b") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BundleError, match="larger than 16 MiB"):
        read_manifest(folder)


def toml(data: dict[str, Any]) -> bytes:
    """Write plain data as TOML; every table in line."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {written(one)}" for key, one in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(written, value)) + "]"
        return repr(value) if isinstance(value, float) else json.dumps(value)

    return "".join(f"{json.dumps(key)} = {written(value)}\n" for key, value in data.items()).encode()


def faulty_toml(data: dict[str, Any]) -> SearchStrategy[bytes]:
    """Return a strategy for a TOML document with one fault; what TOML cannot say (null) is a fault, too."""
    return faulty(data).map(toml) | faulty_bytes(toml(data))


SCENARIO: dict[str, Any] = {
    "title": "a walk",
    "app": {"kv_budget": "25%", "context": 900, "session": True, "restart_s": 0.5, "restarts": 2},
    "turn": [{"prompt": "An operating system", "max_tokens": 9, "pause_s": 1.5}, {"prompt_tokens": 8, "repeat": 2}],
    "event": [
        {"kind": "memory-pressure", "at_s": 1, "limit": "60%", "duration_s": 4.0},
        {"kind": "damage", "at_s": 2.5, "rate": 0.25},
    ],
}
GATE: dict[str, Any] = {"identity": "always", "exact": {"mean_kld": 0.005, "top1": 1}, "partial": {"tasks": 0.95}}
MEASUREMENTS = [
    {
        "machine": "x86-64",
        "weights": "int4",
        "onnx": 1.5,
        "executorch": 2,
        "operators": "edgekv",
        "on": "a Xeon",
    }
]


@examples(120, 4000)
def test_a_scenario_with_a_fault_says_what_it_says_or_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "scenario.toml"

    def check(document: bytes) -> None:
        path.write_bytes(document)
        scenario = unless_refused(lambda: load_scenario(path))
        if scenario is not None:
            said = tomllib.loads(document.decode())
            assert says(asdict(scenario.app), said.get("app", {}))
            assert says([asdict(event) for event in scenario.events], said.get("event", []))
            turns = [turn for turn in said["turn"] for _ in range(turn.get("repeat", 1))]
            assert says([asdict(turn) for turn in scenario.turns], turns)

    for_all(count, faulty_toml(SCENARIO), check)


@examples(120, 4000)
def test_a_gate_with_a_fault_says_what_it_says_or_is_refused(count: int) -> None:
    def check(document: bytes) -> None:
        gate = unless_refused(lambda: parse_gate("mine", document))
        if gate is not None:
            assert says(asdict(gate), tomllib.loads(document.decode()))

    for_all(count, faulty_toml(GATE), check)


@examples(120, 4000)
def test_a_profile_with_a_fault_says_what_it_says_or_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "raspberry-pi-5-8gb.toml"
    whole = (Path(catalog.__file__).parent / path.name).read_bytes()

    def check(document: bytes) -> None:
        path.write_bytes(document)
        profile = unless_refused(lambda: load_profile(path))
        if profile is not None:
            said = tomllib.loads(document.decode())
            for place, entry in profile.entries().items():
                if isinstance(entry, Quantity):
                    stated = functools.reduce(lambda table, key: table[key], place.split("."), said)
                    assert (stated["source"], stated["confidence"]) == (entry.source, entry.confidence)
                    assert isinstance(stated["value"], str) or stated["value"] == entry.value
                    assert 0 <= entry.value <= 1e18

    for_all(count, faulty_toml(tomllib.loads(whole.decode())) | faulty_bytes(whole), check)


@examples(120, 4000)
def test_a_table_of_engines_with_a_fault_says_what_it_says_or_is_refused(count: int) -> None:
    def check(document: bytes) -> None:
        rows = unless_refused(lambda: parse_measurements(document))
        if rows is not None:
            assert says([asdict(row) for row in rows], json.loads(document))

    for_all(count, faulty_json(MEASUREMENTS), check)


@examples(120, 4000)
def test_a_line_of_the_wear_ledger_with_a_fault_counts_as_what_it_says_or_as_damaged(
    tmp_path: Path, count: int
) -> None:
    whole = (DATA / "session-2" / LEDGER).read_bytes()
    lines = faulty(json.loads(whole)).map(lambda line: json.dumps(line).encode()) | faulty_bytes(whole.rstrip())

    def check(line: bytes) -> None:
        (tmp_path / LEDGER).write_bytes(whole + line[:127].ljust(127) + b"\n" + whole)
        entries, damaged = read_ledger(tmp_path)
        assert len(entries) + damaged == 3
        assert all(0 <= entry.bytes_written < 2**63 for entry in entries)
        if not damaged:
            said = json.loads(line[:127])
            entry = entries[1]
            assert (entry.day, entry.run, entry.bytes_written) == (said["day"], said["run"], said["bytes"])

    for_all(count, lines, check)


EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
PROMPT, REST = EXPECTED["prompt"] + EXPECTED["answer"][:12], EXPECTED["answer"][12:18]


@pytest.fixture(scope="module")
def engine() -> Iterator[Generator]:
    """The bundle that the session was made with, open."""
    with Generator.open(DATA / "bundle-1", RunOptions(threads=1, prefixes=False)) as generator:
        yield generator


def go_on(engine: Generator, session: Path) -> list[int] | None:
    """Continue a session where it was; None if it was refused. Whatever tools say of it first is no traceback."""
    unless_refused(lambda: describe(session))
    unless_refused(lambda: contents(session))
    unless_refused(lambda: verify(session))

    def run() -> list[int]:
        options = RunOptions(threads=1, session=SessionOptions(session, 0), prefixes=False)
        generator = engine.fork(options)
        try:
            return list(generator.tokens(PROMPT, max_tokens=len(REST)))
        finally:
            generator.close()

    return unless_refused(run)


def change_row(index: Path, name: str, change: Callable[[bytes], bytes], version: int = FORMAT) -> None:
    """Change a row of an index so that its checksum is right, as somebody would who means it."""
    with closing(sqlite3.connect(index, isolation_level=None)) as database:
        [value] = database.execute("SELECT value FROM item WHERE name = ?", (name,)).fetchone()
        changed = change(value)
        row = (changed, row_check(name, changed, version), name)
        database.execute("UPDATE item SET value = ?, xxh3 = ? WHERE name = ?", row)


def rows_of_session(version: int) -> dict[str, bytes]:
    index = DATA / f"session-{version}" / INDEX
    with closing(sqlite3.connect(f"file:{index}?mode=ro&immutable=1", uri=True)) as database:
        return dict(database.execute("SELECT name, value FROM item").fetchall())


@examples(10, 300)
@pytest.mark.parametrize(
    ("version", "name"),
    seldom(
        [(1, "meta"), (1, "tail"), (2, "meta"), (2, "tail"), (2, "page 0"), (2, "page 1")],
        but=[(1, "meta"), (2, "tail"), (2, "page 0")],
    ),
)
def test_a_session_with_a_fault_in_a_row_goes_on_or_is_refused(
    version: int, name: str, engine: Generator, tmp_path: Path, count: int
) -> None:
    value = rows_of_session(version)[name]
    cases = faulty_bytes(value) if name.startswith("page") else faulty_json(json.loads(value))

    def check(changed: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            session = Path(shutil.copytree(DATA / f"session-{version}", Path(folder) / "chat.kv"))
            (session / BACKUP).unlink()
            change_row(session / INDEX, name, lambda _: changed, version)
            tokens = go_on(engine, session)
            told_to_forget = name == "tail" and b'"pruned": []' not in changed
            assert tokens in (None, REST) or (told_to_forget and tokens is not None)

    before = peak_rss_bytes()
    for_all(count, cases, check)
    assert peak_rss_bytes() - before < 512 << 20


@examples(10, 300)
def test_the_conversation_of_a_session_with_a_fault_says_what_it_says_or_is_refused(
    engine: Generator, tmp_path: Path, count: int
) -> None:
    notes = {"messages": [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Then."}]}

    def check(changed: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            session = Path(shutil.copytree(DATA / "session-2", Path(folder) / "chat.kv"))
            (session / BACKUP).unlink()
            change_row(session / INDEX, "notes", lambda _: changed)
            unless_refused(lambda: describe(session))
            generator = engine.fork(RunOptions(threads=1, session=SessionOptions(session, 0), prefixes=False))
            try:
                messages = unless_refused(lambda: remembered(generator, None))
            finally:
                generator.close()
            assert messages is None or messages == [] or messages == json.loads(changed)["messages"]

    for_all(count, faulty_json(notes), check)


@examples(10, 300)
@pytest.mark.parametrize(
    "name", seldom([INDEX, BACKUP, "pages-00000001.bin", LEDGER], but=[INDEX, "pages-00000001.bin"])
)
def test_a_session_with_a_fault_in_a_file_goes_on_or_is_refused(
    name: str, engine: Generator, tmp_path: Path, count: int
) -> None:
    def check(changed: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            session = Path(shutil.copytree(DATA / "session-2", Path(folder) / "chat.kv"))
            (session / name).write_bytes(changed)
            assert go_on(engine, session) in (None, REST)

    for_all(count, faulty_bytes((DATA / "session-2" / name).read_bytes()), check)
