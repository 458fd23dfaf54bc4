#!/usr/bin/env bash
# Measures everything that the README and benchmarks/results show, on a machine that does nothing else, and fills the
# README's table. About an hour. PYTHON names the interpreter of bertkern, RIVALS the one that has the other engines
# (the same by default).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
rivals=${RIVALS:-$python}
out=benchmarks/results
int8=bertkern-int8,torch-int8,onnxruntime-int8,torchao-int8,ctranslate2-int8,openvino-int8
float=bertkern-fp32,torch-fp32,torch-bf16,onnxruntime-fp32,openvino-bf16

bench() { "$python" -m bertkern bench "$@" --python "$rivals" --out "$out"; }

bench encoder --engines "$int8,$float" --threads 2
bench encoder --engines "$int8,$float" --threads 1 --shapes 1x16,1x128
bench encoder --engines "bertkern-int8@avx2,torch-int8@avx2,torch-fp32@avx2" --threads 2 --shapes 1x32,1x128 --name avx2
bench encoder --engines "$int8,$float" --threads 1 --model minilm --shapes 1x16,1x32,8x32
bench encoder --engines "$int8,$float" --threads 2 --model minilm --shapes 1x16,1x32,8x32:0.3
bench gemm
bench memory
"$python" -m bertkern demo --threads 2 --out "$out"
"$python" -m benchmarks.readme_table
