"""Compiles kernels for AMD's gfx942 as they are on ROCm, in a process of its own; no card and no ROCm is needed.

Prints a line for each, its name and "ok" or what is wrong, as JSON. Nothing of it has run on such a card.
"""

import json
import re
import sys

import torch

# Read where the kernels are defined.
torch.version.hip = "6.4"

from triton.backends.compiler import GPUTarget  # noqa: E402

from bertkern import _triton  # noqa: E402

TARGET = GPUTarget("hip", "gfx942", 64)


def chosen(table):
    """Of each function and type of operands the first entry.

    Those that sm_80 does not know multiply float8 of NVIDIA's kind, which AMD's card has not either.
    """
    found = {}
    for entry in (entry for entry in table if 80 in entry.opcodes):
        kinds = tuple(entry.signature.get(name) for name in ("x", "q", "dy"))
        found.setdefault((entry.function, kinds), entry)
    return found.values()


def main() -> None:
    for name in sys.argv[1:]:
        for entry in chosen(_triton.kernels(name).TABLE):
            try:
                kernel = entry.compile_for(TARGET)
                multiplies = bool(re.search(r"\bv_s?mfma", kernel.asm["amdgcn"])) == bool(entry.opcodes[80])
                said = "ok" if kernel.asm["hsaco"] and multiplies else "no matrix instruction"
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[-600:]
            print(json.dumps({"case": f"{name} {entry.name}", "said": said}), flush=True)


if __name__ == "__main__":
    main()
