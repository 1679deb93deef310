"""ExecuTorch's own export of a checkpoint: int4, its custom_sdpa, and its cache in the graph, in float or INT8.

    python benchmarks/peers/executorch_own.py CHECKPOINT OUT.pte CONTEXT fp32|int8

It is the exporter that comes with the package (examples/models/llama), with the options that its README recommends:
8da4w in groups of 32, as edgekv's bundle has, and an INT8 embedding.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from executorch.examples.models.llama.export_llama_lib import build_args_parser, export_llama
from executorch.examples.models.qwen3.convert_weights import qwen_3_tune_to_meta
from safetensors.torch import load_file


def main(checkpoint: Path, out: Path, context: int, cache: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        weights = {key: value.float() for key, value in load_file(checkpoint / "model.safetensors").items()}
        torch.save(qwen_3_tune_to_meta(weights), folder / "weights.pth")
        parameters = {
            "dim": config["hidden_size"],
            "hidden_dim": config["intermediate_size"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config["num_key_value_heads"],
            "head_dim": config["head_dim"],
            "n_layers": config["num_hidden_layers"],
            "norm_eps": config["rms_norm_eps"],
            "rope_theta": config["rope_parameters"]["rope_theta"],
            "vocab_size": config["vocab_size"],
            "use_scaled_rope": False,
            "use_hf_rope": True,
        }
        (folder / "params.json").write_text(json.dumps(parameters), encoding="utf-8")
        words = [
            *("--checkpoint", str(folder / "weights.pth"), "--params", str(folder / "params.json")),
            *("--use_kv_cache", "--use_sdpa_with_kv_cache", "--xnnpack", "--xnnpack-extended-ops"),
            *("--quantization_mode", "8da4w", "--group_size", "32", "--embedding-quantize", "8,0", "--dtype", "fp32"),
            *("--max_seq_length", str(context), "--max_context_length", str(context)),
            *("--output_name", out.name),
        ]
        # Where the exporter writes, whatever --output-dir says. It must not end in "executorch": it would import from there.
        os.chdir(folder)
        export_llama(build_args_parser().parse_args(words + ["--quantize_kv_cache"] * (cache == "int8")))
        os.replace(folder / out.name, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3]), sys.argv[4])
