"""`edgekv sessions`: list, show, check, compact, copy and remove sessions; and the session options of `edgekv run`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from edgekv import settings
from edgekv.errors import SessionError, UsageError
from edgekv.settings import Interval
from edgekv.sizes import format_bytes

from .options import option
from .output import Facts, print_json, stdout

if TYPE_CHECKING:
    from edgekv.runtime.generate import Generator
    from edgekv.runtime.options import SessionOptions

app = typer.Typer(
    no_args_is_help=True,
    help="List, show, check, compact, copy and remove the sessions that `edgekv run --session` keeps.",
    epilog="Examples:  edgekv sessions list  |  edgekv sessions verify chat.kv  |  edgekv sessions export chat.kv backup.kv",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
File = Annotated[Path, typer.Argument(metavar="SESSION", help="A session, as given to `edgekv run --session`.")]
Encrypted = Annotated[
    bool, typer.Option("--encrypt", help="It is encrypted; the key is looked for as in `edgekv run`.")
]
KeyFile = Annotated[
    Path | None, option(settings.FILE, "--key-file", metavar="FILE", help="File with the key; implies --encrypt.")
]


@app.command("list", epilog="Examples:  edgekv sessions list  |  edgekv sessions list ~/chats --json")
def list_sessions(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to look in.")] = Path("."), as_json: Json = False
) -> None:
    """List the sessions of a folder. Exit 1 when one cannot be read; the others are listed."""
    from edgekv.runtime.sessions import tools as session_tools

    found: list[dict[str, Any]] = []
    unreadable: list[dict[str, Any]] = []
    for path in session_tools.find_sessions(folder):
        try:
            found.append(session_tools.describe(path))
        except SessionError as error:
            unreadable.append({"path": str(path), "problems": [str(error)]})
    if as_json:
        print_json(found + unreadable)
    else:
        _print_list(folder, found)
        for facts in unreadable:
            print(f"edgekv: {facts['problems'][0]}", file=sys.stderr)
    if unreadable:
        raise typer.Exit(1)


def _print_list(folder: Path, found: list[dict[str, Any]]) -> None:
    table = Table("session", "tokens", "on flash", "shared", "saved", "", box=None, pad_edge=False)
    for column in table.columns[1:4]:
        column.justify = "right"
    for facts in found:
        sizes = format_bytes(facts["bytes_on_flash"]), format_bytes(facts["bytes_shared"])
        note = "encrypted" if facts.get("encrypted") else "damaged" if facts["problems"] else ""
        table.add_row(escape(facts["path"]), str(facts.get("tokens", "-")), *sizes, _when(facts["saved_at"]), note)
    stdout().print(table if found else f"no sessions in {folder}", soft_wrap=True)


@app.command(epilog="Examples:  edgekv sessions show chat.kv  |  edgekv sessions show chat.kv --json | jq .tokens")
def show(session: File, encrypt: Encrypted = False, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Show what a session holds and what it was made with; works while it is in use."""
    from edgekv.runtime.sessions import tools as session_tools

    facts = session_tools.describe(session, _secret(encrypt, key_file))
    if as_json:
        print_json(facts)
        return
    shown = Facts()
    key = facts.pop("key", {})
    for name, value in {**facts, **key}.items():
        if name.startswith("bytes_"):
            value = format_bytes(value)
        elif name.endswith("_at"):
            value = _when(value)
        elif isinstance(value, list):
            value = "; ".join(value) or "none"
        shown.add_row(name.replace("_", " "), escape(str(value)))
    shown.print(stdout())


@app.command(epilog="Examples:  edgekv sessions verify chat.kv  |  edgekv sessions verify ~/chats/*.kv --json")
def verify(
    sessions: Annotated[list[Path], typer.Argument(metavar="SESSION...", help="Sessions.")],
    encrypt: Encrypted = False,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Read every record and check it; changes nothing. Exit 1 when something is damaged."""
    from edgekv.runtime.sessions import tools as session_tools

    secret = _secret(encrypt, key_file)
    results = []
    for path in sessions:
        problems, usable = session_tools.verify(path, secret)
        results.append({"path": str(path), "ok": not problems, "usable_tokens": usable, "problems": problems})
        if not as_json:
            found = "".join(f"\n  {problem}" for problem in problems)
            state = f"ok, {usable} tokens" if not problems else f"damaged; the first {usable} tokens can be used{found}"
            typer.echo(f"{path}: {state}")
    if as_json:
        print_json(results)
    damaged = [str(result["path"]) for result in results if not result["ok"]]
    if damaged:
        raise SessionError(
            f"{len(damaged)} of {len(results)} sessions are damaged: {', '.join(damaged)}; a run recomputes what is lost"
        )


@app.command(epilog="Examples:  edgekv sessions compact chat.kv")
def compact(session: File, encrypt: Encrypted = False, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Write what is in use into one new file and give the rest back to the file system."""
    from edgekv.runtime.sessions import tools as session_tools

    before, after = session_tools.compact(session, _secret(encrypt, key_file))
    if as_json:
        print_json({"path": str(session), "bytes_before": before, "bytes_after": after})
    else:
        typer.echo(f"{session}: {format_bytes(before)} before, {format_bytes(after)} now")


@app.command(
    epilog="Examples:  edgekv sessions export chat.kv backup.kv  |  edgekv sessions export chat.kv --json > chat.json"
)
def export(
    session: File,
    target: Annotated[Path | None, typer.Argument(metavar="COPY", help="Where the copy goes.")] = None,
    encrypt: Encrypted = False,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Make an independent copy of a session, or print its tokens and messages as JSON."""
    from edgekv.runtime.sessions import tools as session_tools

    secret = _secret(encrypt, key_file)
    if target is not None:
        session_tools.copy(session, target, secret)
        if as_json:
            print_json(session_tools.describe(target, secret))
        else:
            typer.echo(f"{session} was copied to {target}")
    elif as_json:
        print_json(session_tools.contents(session, secret))
    else:
        raise UsageError("give the name of the copy, or --json to print tokens and messages")


@app.command(epilog="Examples:  edgekv sessions fork chat.kv other-ending.kv")
def fork(
    session: File,
    target: Annotated[Path, typer.Argument(metavar="FORK", help="Name of the new session.")],
    encrypt: Encrypted = False,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Make a session that begins as another one; their pages are shared, or copied to another file system."""
    from edgekv.runtime.sessions import tools as session_tools

    secret = _secret(encrypt, key_file)
    shared = session_tools.fork(session, target, secret)
    if as_json:
        print_json(session_tools.describe(target, secret))
    else:
        typer.echo(f"{target} begins as {session} and {'shares' if shared else 'holds a copy of'} its pages")


@app.command("rm", epilog="Examples:  edgekv sessions rm chat.kv  |  edgekv sessions rm old-*.kv --json")
def remove(
    sessions: Annotated[list[Path], typer.Argument(metavar="SESSION...", help="Sessions.")], as_json: Json = False
) -> None:
    """Delete sessions. Pages that another session shares stay for the other one."""
    from edgekv.runtime.sessions import tools as session_tools

    freed = {str(path): session_tools.remove(path) for path in sessions}
    if as_json:
        print_json([{"path": path, "bytes_freed": size} for path, size in freed.items()])
        return
    for path, size in freed.items():
        typer.echo(f"{path}: removed, {format_bytes(size)} freed")


# -- for `edgekv run` ------------------------------------------------------------------------------------------


def session_options(
    path: Path | None, resume: bool, every: Interval | None, encrypt: bool, key_file: Path | None
) -> SessionOptions | None:
    """Turn the options of `edgekv run` into those of a session, or None without one.

    Raises:
        UsageError: an option needs --session, or makes no sense.
    """
    from edgekv.runtime.options import SessionOptions

    if path is None:
        for name, given in (
            ("--continue", resume),
            ("--checkpoint-every", every),
            ("--encrypt", encrypt),
            ("--key-file", key_file),
        ):
            if given:
                raise UsageError(f"{name} needs --session FILE")
        return None
    secret = _secret(encrypt, key_file)
    return (
        SessionOptions(path, secret=secret)
        if every is None
        else SessionOptions(path, every.tokens, every.seconds, secret)
    )


def continued(generator: Generator, text: str | None) -> list[int]:
    """Return the tokens of the session, with a text added.

    Raises:
        UsageError: the session is empty and there is no text.
    """
    assert generator.session is not None
    tokens = generator.session.tokens
    if text is not None:
        tokens = tokens + generator.text.encode_behind(tokens, text) if tokens else generator.text.encode(text)
    if not tokens:
        raise UsageError(f"the session {generator.session.path} is empty: give it a --prompt first")
    return tokens


def session_facts(generator: Generator) -> dict[str, Any]:
    """Return what a run did with its session, for --json; empty without one."""
    session = generator.session
    if session is None:
        return {}
    return {
        "session": {
            "path": str(session.path),
            "reused_tokens": session.reused_tokens,
            "computed_tokens": session.computed_tokens,
            "discarded_tokens": session.discarded_tokens,
            "checkpoints": session.checkpoints,
            "read_only": session.read_only,
            "not_saved": session.failure,
            "problems": session.problems,
        }
    }


def session_line(generator: Generator) -> str:
    """Return what a run did with its session in one line."""
    session = generator.session
    assert session is not None
    parts = [f"{session.reused_tokens} tokens reused, {session.computed_tokens} computed"]
    if session.discarded_tokens:
        parts.append(f"{session.discarded_tokens} of the old history replaced")
    if session.read_only:
        parts.append(f"not saved: {session.read_only}")
    if session.failure:
        parts.append(f"not saved: {session.failure}")
    parts += session.problems
    return "; ".join(parts)


def _secret(encrypt: bool, key_file: Path | None) -> bytes | None:
    from edgekv.runtime.storage.cipher import find_secret

    return find_secret(key_file) if encrypt or key_file is not None else None


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
