"""A unit of systemd that serves a bundle as long as the device runs."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNIT = """[Unit]
Description=edgekv serve {name}

[Service]
ExecStart={command}
Restart=on-failure

[Install]
WantedBy=default.target
"""


def unit_name(bundle: str) -> str:
    """Name the unit of a bundle."""
    return f"edgekv-{re.sub(r'[^A-Za-z0-9_.-]', '_', bundle.removesuffix('.edgekv'))}.service"


def unit_text(bundle: str, command: Sequence[str]) -> str:
    """Return the unit's file."""
    return _UNIT.format(name=bundle.replace("%", "%%"), command=" ".join(map(_quoted, command)))


def _quoted(word: str) -> str:
    """Quote a word of a command line, as systemd.service(5) asks for."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if re.search(r"[^\w@%+=:,./$-]", text) or not text else text
