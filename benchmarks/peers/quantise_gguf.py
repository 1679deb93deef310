"""Quantise a GGUF file to Q4_0 with llama.cpp's own quantiser.

Usage: quantise_gguf.py IN.gguf OUT.gguf
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def main() -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.pure = True  # every matrix in 4 bits, the output head too, as in the other contestants
    if llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)):
        sys.exit(f"llama.cpp could not quantise {sys.argv[1]}")


if __name__ == "__main__":
    main()
