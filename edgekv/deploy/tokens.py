"""The tokens of a bundle for a short prompt, greedily: ``python -m edgekv.deploy.tokens BUNDLE``, here and on a device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgekv.runtime.generate import Generator, RunOptions

#: Words of all kinds, so that tokenizer and embedding are asked for more than one.
PROMPT = "The river was 12 miles long, and on the other side of it there was a house. In the house"
CONTEXT, GENERATED = 256, 16


def greedy_tokens(bundle: Path) -> list[int]:
    """Return the tokens of the prompt and, behind them, those that are generated."""
    with Generator.open(bundle, RunOptions(context=CONTEXT, threads=1)) as generator:
        prompt = generator.text.encode(PROMPT)
        return [*prompt, *generator.tokens(prompt, max_tokens=GENERATED)]


if __name__ == "__main__":
    print(json.dumps(greedy_tokens(Path(sys.argv[1]))))
