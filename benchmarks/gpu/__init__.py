"""One command for a CUDA card: does everything run, is it right, how fast is it beside what one could use instead?

    python -m benchmarks.gpu                                all sections, within 9 minutes
    python -m benchmarks.gpu --sections ops,models --again  two of them anew

| section | what it does |
|---|---|
| smoke | each Triton kernel of the tables and each operator of the CUDA library |
| tests | pytest -m gpu, of what is no part of smoke |
| sanitizer | compute-sanitizer over small kernels (also: `make gpu-sanitize`) |
| ops | peaks of the card, then linear layers, sparse, 4-bit, attention, row kernels, beside peers |
| models | BERT-base, whole and pruned, beside torch eager and compiled |
| profile | what the kernels of the worst miss of the sections before take |

A section is a file of rows under `results/gpu/` (schema: `benchmarks/results.py`), written as it goes; one that ended
is skipped the next time. Whatever touches the card runs in a child with a timeout (`process.py`), says its rows line by
line, and is started anew after a crash or a hang without the provider, the kernel or the test that it was in.

How a number comes about (`timing.py`): each provider's output is compared with a float64 reference; then providers take
turns, round by round, in one process; a turn replays a CUDA graph of many calls between two events. "cold" rotates
over copies of the weight, 4 times the L2 in all; "hot" has one. Shares are of peaks measured in the same run.
"""
