"""`edgekv`, and `python -m edgekv`."""

import sys

from edgekv.cli.interrupt import Interrupted, Signals


def main() -> None:
    """Be the process of a command line; signals are watched before its imports, which take most of a start."""
    signals = Signals()
    try:
        signals.watch()
        from edgekv.cli.main import main as command_line

        command_line(signals)
    except Interrupted as end:  # one that came outside of the command, which says so itself
        print(f"edgekv: {end}", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
