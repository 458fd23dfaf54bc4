#!/usr/bin/env bash
# Measures everything that the README and benchmarks/results show, on a machine that does nothing else, and fills the
# README's table. About three hours, and four more for bench qbert, which trains models and goes on where it was
# stopped. PYTHON names the interpreter of bertkern, RIVALS the one that has the other engines (the same by default),
# DEEPSPARSE the one that has DeepSparse (see benchmarks/engines/deepsparse_engine.py), SENTENCES the one that has
# sentence-transformers[onnx,openvino] and datasets.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
rivals=${RIVALS:-$python}
deepsparse=${DEEPSPARSE:-$rivals}
sentences=${SENTENCES:-$rivals}
out=benchmarks/results
int8=bertkern-int8,torch-int8,onnxruntime-int8,torchao-int8,ctranslate2-int8,openvino-int8
float=bertkern-fp32,torch-fp32,torch-bf16,onnxruntime-fp32,openvino-bf16

bench() { "$python" -m bertkern bench "$@" --python "$rivals" --python "deepsparse=$deepsparse" --out "$out"; }

bench encoder --engines "$int8,$float" --threads 2
bench encoder --engines "$int8,$float" --threads 1 --shapes 1x16,1x128
bench encoder --engines "bertkern-int8@avx2,torch-int8@avx2,torch-fp32@avx2" --threads 2 --shapes 1x32,1x128 --name avx2
bench encoder --engines "$int8,$float" --threads 1 --model minilm --shapes 1x16,1x32,8x32
bench encoder --engines "$int8,$float" --threads 2 --model minilm --shapes 1x16,1x32,8x32:0.3
bench gemm
bench sparse
bench sparse --rows 128 --layers 3072x768,768x3072,768x768,833x717 --blocks 1x1,1x4,4x1,4x4,16x4,16x16,32x32,64x64,128x128 \
    --zeros 0,0.05,0.1,0.25,0.5,0.75,0.8,0.85,0.9,0.95 --dtypes int8,fp32,bf16 --name blocks
bench sparse --rows 1,7,32,1024 --layers 3072x768,768x3072 --name rows
for pattern in 16x4@0.8 32x32@0.8 1x4@0.8; do
    bench encoder --pattern "$pattern" --threads 2 --shapes 1x128,8x128 \
        --engines "$int8,deepsparse-int8,bertkern-int8:dense"
done
bench encoder --pattern 1x1@0.9 --threads 2 --shapes 1x128,8x128 --engines "$float,deepsparse-fp32,bertkern-fp32:dense"
bench encoder --model bert-base-d26 --threads 2 --shapes 1x128,8x128 --engines bertkern-int8,bertkern-fp32,torch-fp32
"$python" -m bertkern bench attention --threads 2 --out "$out"
"$python" -m bertkern bench attention --threads 1 --shapes 1x16,1x128,8x128,1x384,1x2048 --out "$out"
"$python" -m bertkern bench attention --threads 2 --head-dim 32 --shapes 32x16,32x32:0.3,8x128,1x384 --out "$out"
"$python" -m bertkern bench padding --threads 2 --out "$out"
"$python" -m bertkern bench padding --threads 2 --model minilm --batches 16 --out "$out"
"$python" -m bertkern bench heads --threads 2 --out "$out"
"$python" -m bertkern bench heads --threads 2 --engines bertkern-int8,bertkern-int8-masked --name int8 --out "$out"
"$python" -m bertkern bench sentences --threads 2 --out "$out" \
    --python "onnxruntime=$sentences" --python "openvino=$sentences"
"$python" -m bertkern bench importance --threads 2 --sentences 1000 --rounds 1 --out "$out"
bench groupwise
"$python" -m bertkern bench hessian --threads 2 --out "$out"
bench memory
"$python" -m bertkern demo --threads 2 --out "$out"
"$python" -m bertkern bench qbert --threads 2 --kept-rows "$out/qbert-rows.jsonl" --out "$out"
"$python" -m benchmarks.readme_table
