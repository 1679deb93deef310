#!/usr/bin/env bash
# Install what `make bench` compares with, from pip, and convert one checkpoint for all. Safe to run again.
# Usage: benchmarks/peers/setup.sh DIR    then: EDGEKV_PEERS=DIR make bench    (13 GB, 25 minutes; compiles llama.cpp)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?usage: setup.sh DIR}/models"
cd "$1"
dir=$PWD
python=${PYTHON:-python3}
llama_version=0.3.36

say() { printf '%s\n' "peers: $*"; }
pip() { local venv=$1; shift; "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# onnxruntime-genai and transformers; these convert the checkpoint too
if [ ! -e genai/.ready ]; then
  say "onnxruntime-genai, transformers"
  [ -x genai/bin/python ] || "$python" -m venv genai
  pip genai install "torch==2.13.0"
  pip genai install "onnxruntime==1.32.0" "onnxruntime-genai==0.18.0" "transformers>=5" onnx onnx-ir gguf sentencepiece
  touch genai/.ready
fi
# llama.cpp, compiled for this machine; its source has the converter too
if [ ! -d llama_source ]; then
  say "llama.cpp's source"
  pip genai download --no-deps --no-binary :all: -d sdist "llama-cpp-python==$llama_version"
  rm -rf llama_source.part
  mkdir llama_source.part
  tar -xzf sdist/llama_cpp_python-*.tar.gz -C llama_source.part --strip-components=1
  mv llama_source.part llama_source
fi
if [ ! -e llamacpp/.ready ]; then
  say "llama.cpp (compiles)"
  [ -x llamacpp/bin/python ] || "$python" -m venv llamacpp
  pip llamacpp install numpy
  # GCC 12 takes the stores of the AMX tile configuration for dead and removes them (llama.cpp pull request 26954): it
  # then crashes at the first product on a processor with AMX.
  args="-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF"
  CMAKE_ARGS="$args '-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse'" pip llamacpp install sdist/llama_cpp_python-*.tar.gz
  touch llamacpp/.ready
fi
# OpenVINO GenAI and MNN, with the packages of genai/ behind their own
beside_genai() {
  [ -x "$1/bin/python" ] || "$python" -m venv "$1"
  genai/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
    >"$("$1/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/genai.pth"
}
if [ ! -e openvino/.ready ]; then
  say "OpenVINO GenAI"
  beside_genai openvino
  pip openvino install "openvino-genai==2026.4.1.0" "nncf==3.4.0" "transformers==5.5.4"
  pip openvino install --no-deps "optimum==2.3.0" "optimum-intel==2.2.0"  # they ask for torchvision, and use it for images
  touch openvino/.ready
fi
if [ ! -e mnn/.ready ]; then
  say "MNN"
  beside_genai mnn
  pip mnn install "MNN==3.6.1" yaspin
  pip mnn install --no-deps "llmexport==0.0.5"
  touch mnn/.ready
fi

if [ ! -e ckpt/model.safetensors ]; then
  say "checkpoint"
  genai/bin/python "$here/make_checkpoint.py" ckpt
fi

# onnxruntime-genai: float, INT8 and INT4 cache
builder() {
  local out=models/$1; shift
  [ -e "$out/genai_config.json" ] && return
  say "$out"
  genai/bin/python -m onnxruntime_genai.models.builder -i ckpt -o "$out" -p int4 -e cpu -c "$dir/builder-cache" \
    --extra_options prune_lm_head=true shared_embeddings=true "$@" >"$out.log" 2>&1
}
builder genai-int4-f32
[ -e models/kv_per_channel.json ] || genai/bin/python "$here/kv_scales.py" ckpt models
builder genai-int4-int8 kv_cache_quant_scheme=int8_per_tensor kv_cache_scale_file="$dir/models/kv_per_tensor.json"
builder genai-int4-int4 kv_cache_quant_scheme=int4_per_channel kv_cache_scale_file="$dir/models/kv_per_channel.json"

# llama.cpp: Q4_0
if [ ! -e models/q4_0.gguf ]; then
  say "models/q4_0.gguf"
  genai/bin/python "$here/convert_gguf.py" llama_source/vendor/llama.cpp ckpt models/bf16.gguf >models/gguf.log 2>&1
  llamacpp/bin/python "$here/quantise_gguf.py" models/bf16.gguf models/q4_0.gguf >>models/gguf.log 2>&1
  rm models/bf16.gguf
fi
# OpenVINO: every matrix in 4 bits, in groups of 32
if [ ! -e models/openvino-int4/openvino_model.bin ]; then
  say "models/openvino-int4"
  HF_HUB_OFFLINE=1 openvino/bin/optimum-cli export openvino --model ckpt --task text-generation-with-past \
    --weight-format int4 --sym --group-size 32 --ratio 1.0 --all-layers models/openvino-int4 >models/openvino.log 2>&1
fi
# MNN: 4 bits in blocks of 32. The exporter imports its own modules by their bare names, so it runs as a file; its
# converter would install a client that reports what was converted, so it has no index to install that from.
if [ ! -e models/mnn-int4/config.json ]; then
  say "models/mnn-int4"
  exporter=$(mnn/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/llmexport/llmexport.py
  (cd models && PIP_NO_INDEX=1 ../mnn/bin/python "$exporter" --path "$dir/ckpt" --export mnn --quant_bit 4 \
    --quant_block 32 --sym --dst_path mnn-int4.part >mnn.log 2>&1)
  rm -f models/.export.log
  mv models/mnn-int4.part models/mnn-int4
fi
# ExecuTorch's own export, where edgekv's environment has executorch: float and INT8 cache
own_python=${EDGEKV_PYTHON:-$here/../../.venv/bin/python}
for cache in fp32 int8; do
  out=executorch/$cache.pte
  { [ -e "$out" ] || ! "$own_python" -c "import torchao, executorch" 2>/dev/null; } && continue
  say "$out (minutes)"
  mkdir -p executorch
  "$own_python" "$here/executorch_own.py" ckpt "$out" 4160 $cache >executorch/$cache.log 2>&1
done
say "ready: EDGEKV_PEERS=$dir make bench"
