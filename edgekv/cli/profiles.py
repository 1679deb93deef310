"""``edgekv profiles``: list, show, compare and check device profiles."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from edgekv import device_profiles
from edgekv.errors import ProfileError

from . import calibrate
from .options import beginning_with, profile_names
from .output import print_json, stdout
from .profile_table import print_profile

app = typer.Typer(
    help="List, show, compare and check device profiles. Without a command: list.",
    epilog="Examples:  edgekv profiles  |  edgekv profiles show pixel-8-8gb  |  "
    "edgekv profiles diff galaxy-s23-8gb galaxy-s24-8gb  |  edgekv profiles validate my-board.toml",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A profile's name, or the path of a .toml file.",
        autocompletion=beginning_with(profile_names),
    ),
]


@app.callback(invoke_without_command=True)
def profiles(ctx: typer.Context, as_json: Json = False) -> None:
    """List, show, compare and check device profiles. Without a command: list."""
    if ctx.invoked_subcommand is None:
        list_profiles(as_json)


@app.command("list", epilog="Examples:  edgekv profiles list  |  edgekv profiles list --json")
def list_profiles(as_json: Json = False) -> None:
    """List all profiles, bundled and your own."""
    found, problems = device_profiles.load_many(device_profiles.names())
    if as_json:
        print_json([profile.to_json() for profile in found])
    else:
        table = Table("name", "kind", "RAM", "limit", "beyond", "from", box=None, pad_edge=False)
        table.columns[0].no_wrap = True
        for profile in found:
            memory = profile.memory
            limits = (str(memory.ram_bytes), str(memory.app_limit_bytes), memory.kill)
            origin = "you" if profile.path.parent == device_profiles.user_dir() else "edgekv"
            table.add_row(profile.name, profile.kind, *limits, origin)
        stdout().print(table)
    _raise(problems)


@app.command(
    epilog="Examples:  edgekv profiles show raspberry-pi-5-8gb  |  edgekv profiles show ./my-board.toml --json"
)
def show(name: Name, as_json: Json = False) -> None:
    """Show every number of a profile with its source and confidence."""
    profile = device_profiles.load(name)
    if as_json:
        print_json(profile.to_json())
        return
    print_profile(profile)


@app.command(epilog="Examples:  edgekv profiles diff galaxy-s23-8gb galaxy-s24-8gb")
def diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="A profile's name or file.", autocompletion=beginning_with(profile_names))
    ],
    second: Annotated[
        str,
        typer.Argument(
            metavar="B", help="Another profile's name or file.", autocompletion=beginning_with(profile_names)
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show the fields in which two profiles differ."""
    a, b = device_profiles.load(first), device_profiles.load(second)
    rows = device_profiles.diff(a, b)
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    table = Table("field", a.name, b.name, box=box.SIMPLE_HEAD)
    table.columns[1].overflow = table.columns[2].overflow = "fold"
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row.field, escape(row.first or "-"), escape(row.second or "-"))
    stdout().print(table if rows else f"{a.name} and {b.name} have the same values")


@app.command(
    epilog="Examples:  edgekv profiles validate my-board.toml  |  edgekv profiles validate *.toml --json  |  "
    "edgekv profiles validate android-low-4gb"
)
def validate(
    profiles: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME|FILE...", help="Profiles: names or files.", autocompletion=beginning_with(profile_names)
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check profiles; exit 2 when one is wrong."""
    checked = [(name, *device_profiles.load_many([name])) for name in profiles]
    wrong = sum(bool(problems) for _, _, problems in checked)
    if as_json:
        print_json(
            [{"profile": name, "problem": str(problems[0]) if problems else None} for name, _, problems in checked]
        )
    else:
        for _, found, problems in checked:
            print(problems[0] if problems else f"{found[0].path}: ok")
    if wrong:
        raise ProfileError(f"{wrong} of {len(checked)} profiles cannot be used")


def _raise(problems: list[ProfileError]) -> None:
    if problems:
        raise ProfileError("; ".join(map(str, problems)))


app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate_command)
