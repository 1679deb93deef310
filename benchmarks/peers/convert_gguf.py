"""Run llama.cpp's own converter on a checkpoint.

Usage: convert_gguf.py LLAMA_CPP_SOURCE CHECKPOINT OUT.gguf

Only one thing is changed: the converter asks which published tokenizer it sees, and ours is none of them.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from typing import Any


def main() -> None:
    source, checkpoint, out = sys.argv[1:4]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    base: Any = importlib.import_module("conversion.base")
    for value in vars(base).values():
        if isinstance(value, type) and "get_vocab_base_pre" in vars(value):
            value.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # type: ignore[attr-defined]
    sys.argv[:] = [f"{source}/convert_hf_to_gguf.py", checkpoint, "--outtype", "bf16", "--outfile", out]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
