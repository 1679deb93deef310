"""The `edgekv` command: mounts the subcommands and prints errors, in one place."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import edgekv
from edgekv import settings
from edgekv.errors import EdgeKVError
from edgekv.logs import show_logs

from . import calibrate, emulate, plan, run, stats, sweep, verify
from .export import export_command
from .inspect import inspect_command
from .interrupt import Signals
from .offload import app as offload_app
from .prefix import app as prefix_app
from .process import exit_code, open_streams
from .profiles import app as profiles_app
from .sessions import app as sessions_app

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Virtual memory for attention: run decoder LLMs with a paged KV cache inside a memory budget.",
    epilog="Start with: `edgekv export demo --out demo.edgekv && edgekv run demo.edgekv --prompt 'It was'`",
    pretty_exceptions_enable=False,
)
app.command("export")(export_command)
app.command("run", epilog=run.EPILOG)(run.run_command)
app.command("inspect")(inspect_command)
app.command("plan", epilog=plan.EPILOG)(plan.plan_command)
app.command("emulate", epilog=emulate.EPILOG)(emulate.emulate_command)
app.command("sweep", epilog=sweep.EPILOG)(sweep.sweep_command)
app.command("verify", epilog=verify.EPILOG)(verify.verify_command)
app.command("stats", epilog=stats.EPILOG)(stats.stats_command)
profiles_app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate_command)
app.add_typer(profiles_app, name="profiles")
app.add_typer(sessions_app, name="sessions")
app.add_typer(prefix_app, name="prefix")
app.add_typer(offload_app, name="offload")


def _print_version(value: bool) -> None:
    if value:
        print(f"edgekv {edgekv.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
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
