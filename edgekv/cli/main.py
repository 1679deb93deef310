"""The `edgekv` command: mounts the subcommands and prints errors, in one place."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

import edgekv
from edgekv.cli import calibrate, emulate, plan, run, stats, sweep, verify
from edgekv.cli.export import export_command
from edgekv.cli.inspect import inspect_command
from edgekv.cli.offload import app as offload_app
from edgekv.cli.prefix import app as prefix_app
from edgekv.cli.profiles import app as profiles_app
from edgekv.cli.sessions import app as sessions_app
from edgekv.errors import EdgeKVError

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
) -> None:
    pass


def main() -> None:
    """Run the command line; an EdgeKVError becomes one line on stderr and its exit code."""
    try:
        app()
    except EdgeKVError as error:
        print(f"edgekv: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        print("edgekv: the system gives this process no more memory; lower --kv-budget or --context", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("edgekv: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
