"""The `edgekv` command: mounts the subcommands and prints errors, in one place."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from edgekv import settings
from edgekv.errors import EdgeKVError
from edgekv.logs import show_logs

from .interrupt import Signals
from .process import exit_code, open_streams

#: In the order of --help; each is a module here, with a group called ``app`` or a function ``NAME_command``.
COMMANDS = (
    "export", "run", "serve", "deploy", "inspect", "bench", "plan", "emulate", "sweep", "verify", "stats", "profiles",
    "sessions", "prefix", "offload",
)  # fmt: skip


class _Commands(Mapping[str, Any]):
    """The commands by name, each imported when it is asked for: those that are not run would take a third of every start."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        return _load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Root(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast(Any, _Commands())


@functools.cache
def _load(name: str) -> Any:
    module = importlib.import_module(f".{name}", __package__)
    part = getattr(module, "app", None)
    if part is None:
        part = typer.Typer()
        part.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, f"{name}_command"))
    part.rich_markup_mode = app.rich_markup_mode
    group = typer.main.get_group(part)
    command = group if hasattr(module, "app") else group.commands[name]
    command.name = name
    return command


app = typer.Typer(
    cls=_Root,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Virtual memory for attention: run decoder LLMs with a paged KV cache inside a memory budget.",
    epilog="Start with: `edgekv export demo --out demo.edgekv && edgekv run demo.edgekv --prompt 'It was'`",
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        from edgekv.runtime.build import describe_build  # loads the kernels

        print(describe_build())
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version and build, and exit."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what engines and libraries log, as EDGEKV_LOG=info does.")
    ] = False,
) -> None:
    if verbose:
        os.environ[settings.LOG.name] = "info"  # for the processes that a command starts, too
    show_logs()


@functools.cache
def _parser() -> Any:
    return typer.main.get_command(app)


def run_command_line(arguments: Sequence[str], signals: Signals | None = None) -> int:
    """Run a command line and return its exit code; see :data:`edgekv.cli.process.EXIT_CODES`."""
    signals = signals or Signals()

    def command() -> None:
        parser = _parser()
        try:
            with parser.make_context("edgekv", list(arguments), obj=signals) as context:
                parser.invoke(context)
        except EdgeKVError:
            raise
        except Exception:  # of a library that turned the signal into an error of its own
            signals.check()
            raise
        signals.end()

    return exit_code(command)


def main(signals: Signals | None = None) -> None:
    """Be the process of a command line, interrupted by the signals that are watched."""
    if "_EDGEKV_COMPLETE" in os.environ:
        app(prog_name="edgekv")  # the shell asks what could be typed
    open_streams()
    sys.exit(run_command_line(sys.argv[1:], signals))


if __name__ == "__main__":
    main()
