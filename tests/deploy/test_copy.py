"""Files on their way to a device: through a real sshd, cut off, damaged, and into a full drive."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edgekv.bundle import file_sha256
from edgekv.deploy.copy import Item, copy, plan_copy
from edgekv.deploy.device import Device, connect
from edgekv.deploy.facts import ask_device
from edgekv.deploy.target import Target, parse_target
from edgekv.errors import DeviceLost, EdgeKVError, UsageError

from .conftest import Board

SIZE = 6 << 20


def nothing(name: str, done: int, total: int) -> None:
    """Show no bar."""


@pytest.fixture
def item(tmp_path: Path) -> Item:
    path = tmp_path / "it's big.bin"
    path.write_bytes(os.urandom(SIZE))
    return Item(path, path.name, SIZE, file_sha256(path))


@pytest.fixture
def folder(board: Board, tmp_path: Path) -> Path:
    return board.home / f"to {tmp_path.name}"


def test_a_copy_that_was_cut_off_goes_on_and_sends_only_the_rest(board: Board, item: Item, folder: Path) -> None:
    small = Item(item.source.parent / "a", "a", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    small.source.write_bytes(b"abc")

    def cut(name: str, done: int, total: int) -> None:
        if done > SIZE * 5 // 6:
            for process in psutil.Process(board.sshd).children(recursive=True):
                process.kill()

    with connect(board.target, board.options) as device, pytest.raises(DeviceLost, match="goes on where it ended"):
        copy(device, plan_copy(device, [small, item], str(folder)), cut)
    assert not (folder / item.name).exists()

    with connect(board.target, board.options) as device:
        plan = plan_copy(device, [small, item], str(folder))
        assert [(one.item, one.wrong) for one in plan.missing] == [(item, False)]
        begun = (folder / f"{item.name}.part").stat().st_size
        assert begun > SIZE // 3
        assert copy(device, plan, nothing) == plan.left == SIZE - begun
        assert plan_copy(device, [small, item], str(folder)).left == 0
    assert file_sha256(folder / item.name) == item.sha256


@pytest.mark.parametrize("damage", ["a wrong byte", "too long", "whole but for its name"])
def test_a_part_is_believed_only_by_its_hash(damage: str, device: Device, item: Item, folder: Path) -> None:
    folder.mkdir()
    begin = item.source.read_bytes()[: SIZE if damage.startswith("whole") else 1 << 20]
    if damage == "a wrong byte":
        begin = bytes([begin[0] ^ 1]) + begin[1:]
    (folder / f"{item.name}.part").write_bytes(begin if damage != "too long" else item.source.read_bytes() + b"x")
    plan = plan_copy(device, [item], str(folder))
    assert plan.left == (0 if damage.startswith("whole") else SIZE)
    assert copy(device, plan, nothing) == plan.left
    assert file_sha256(folder / item.name) == item.sha256


def test_what_another_folder_has_is_not_sent(device: Device, item: Item, folder: Path) -> None:
    folder.mkdir()
    (folder / item.name).write_bytes(item.source.read_bytes())
    plan = plan_copy(device, [item], f"{folder}.part", str(folder))
    assert copy(device, plan, nothing) == 0
    assert file_sha256(Path(f"{folder}.part", item.name)) == item.sha256


def test_a_file_that_changes_while_it_is_sent_never_gets_its_name(device: Device, item: Item, folder: Path) -> None:
    plan = plan_copy(device, [item], str(folder))
    item.source.write_bytes(os.urandom(SIZE))
    with pytest.raises(EdgeKVError, match="does not become what was sent"):
        copy(device, plan, nothing)
    assert not (folder / item.name).exists()


def test_a_drive_that_becomes_full_is_named_and_the_rest_goes_on_later(
    device: Device, item: Item, folder: Path
) -> None:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("needs to mount a small drive, as root")
    try:
        with pytest.raises(EdgeKVError, match=r"cannot write .* No space left"):
            copy(device, plan_copy(device, [item], str(folder)), nothing)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        plan = plan_copy(device, [item], str(folder))
        assert SIZE - plan.left > 1 << 20
        copy(device, plan, nothing)
        assert file_sha256(folder / item.name) == item.sha256
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def adb(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A program that is called as adb is, tells no exit code of exec-in, and runs what it is told as the board does."""
    program = tmp_path / "bin" / "adb"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        '[ "$1" = -s ] && { [ "$2" = emulator-5554 ] || { echo "adb: device \'$2\' not found" >&2; exit 1; }; shift 2; }\n'
        'mode=$1; shift; [ "$1" = -T ] && shift\n'
        f'env -i HOME={board.home} PATH={board.bin}:/usr/bin:/bin /bin/sh -c "$*" 2>"$0.err"; code=$?\n'
        '[ "$mode" = exec-in ] && exit 0; cat "$0.err" >&2; exit $code\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with connect(parse_target("adb:emulator-5554")) as found:
        yield found


def test_over_adb_a_device_says_the_same_of_itself(adb: Device, device: Device) -> None:
    one, other = ask_device(adb, "x"), ask_device(device, "x")
    assert dataclasses.replace(one, available_bytes=0, free_flash_bytes=0) == dataclasses.replace(
        other, available_bytes=0, free_flash_bytes=0
    )


def test_over_adb_files_go_the_same_way(adb: Device, item: Item, folder: Path) -> None:
    folder.mkdir()
    (folder / f"{item.name}.part").write_bytes(item.source.read_bytes()[: SIZE // 2])
    plan = plan_copy(adb, [item], str(folder))
    assert copy(adb, plan, nothing) == SIZE // 2
    assert file_sha256(folder / item.name) == item.sha256


def test_over_adb_a_file_that_cannot_be_written_is_an_error_although_exec_in_tells_none(
    adb: Device, item: Item, folder: Path
) -> None:
    plan = plan_copy(adb, [item], str(folder))
    (folder / f"{item.name}.part").mkdir(parents=True)
    with pytest.raises(EdgeKVError, match="does not become what was sent"):
        copy(adb, plan, nothing)


def test_a_device_that_adb_does_not_know_is_one_line(adb: Device) -> None:
    with connect(parse_target("adb:other")) as device, pytest.raises(DeviceLost, match="device 'other' not found"):
        device.run("true")


def test_who_is_not_let_in_is_told_so_by_ssh(board: Board) -> None:
    options = [f"IdentityFile={board.home}/none" if "IdentityFile" in one else one for one in board.options]
    with pytest.raises(DeviceLost, match=r"cannot be reached: .*Permission denied"), connect(board.target, options):
        pass


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("pi@raspberrypi.local", Target("ssh", "pi@raspberrypi.local")),
        ("pi@10.0.0.2:2222", Target("ssh", "pi@10.0.0.2", 2222)),
        ("board", Target("ssh", "board")),
        ("pi@[fe80::1%eth0]:22", Target("ssh", "pi@[fe80::1%eth0]", 22)),
        ("adb", Target("adb", "")),
        ("adb:192.168.1.5:5555", Target("adb", "192.168.1.5:5555")),
    ],
)
def test_a_target_is_read_as_it_is_printed(text: str, target: Target) -> None:
    assert parse_target(text) == target
    assert str(target) == text


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "a b", "pi@-x", "pi@host:0", "pi@host:70000", "adb:", "adb:-s", "x;y"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="TARGET must be"):
        parse_target(text)
