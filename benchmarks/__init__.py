"""Benchmarks: bertkern beside the engines that a user could pick instead.

    python -m bertkern bench encoder     BERT-base end to end, any engines as columns
    python -m bertkern bench gemm        one linear layer as a share of the processor's own peak
    python -m bertkern bench sparse      the same with zeros in its weight: speed-up over density, and the break-even
    python -m bertkern bench attention   attention alone beside torch's, over lengths, and with fewer heads
    python -m bertkern bench padding     batches of real sentences, with and without their padding
    python -m bertkern bench heads       BERT-base without half of its heads, removed or masked
    python -m bertkern bench sentences   sentences a second behind sentence-transformers, beside its own int8 backends
    python -m bertkern bench importance  the cost of head importance, in forward and backward passes
    python -m bertkern bench hessian     the minutes that the sensitivity of all layers takes
    python -m bertkern demo              a real sentence encoder on a real test set: accuracy, speed, size

How a number comes about (`harness.py`): every engine lives in a process of its own; the engines take turns with a pause
between, so that the idle threads of one never run beside the calls of another; each turn starts with one untimed call;
a two-thread sample counts only where the peak probe before and after it shows an undisturbed machine; the output of
every engine is compared with fp32 torch before anything is timed. Ratios are formed within one run, round by round.

`results/` holds the rows as JSON and CSV (schema: `results.py`) and their plots; the table in the README is generated
from there by `readme_table.py`.
"""
