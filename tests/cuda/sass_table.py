"""Every CUDA kernel, and what its machine code must hold; `test_sass.py` reads it. Adding a kernel is adding a row."""

from __future__ import annotations

from dataclasses import dataclass

SM80, SM90, SM100, SM120 = TARGETS = ("80", "90a", "100a", "120")


@dataclass(frozen=True)
class Kernel:
    """A kernel, or several instances of a template.

    source: below csrc/cuda. name: a pattern that is found in the demangled name, such as `row_kernel<1, ` for all with
    that first argument. opcodes: patterns of which the machine code must have an instruction each, for every target, or
    by target: a kernel that its guards leave empty does not pass. targets: those that the kernel is for; on others it
    need not be there.
    """

    source: str
    name: str
    opcodes: tuple[str, ...] | dict[str, tuple[str, ...]]
    targets: tuple[str, ...] = TARGETS

    def wanted(self, target: str) -> tuple[str, ...]:
        return self.opcodes[target] if isinstance(self.opcodes, dict) else self.opcodes


STAGED = (r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4")
WIDE = (r"LDG\.E\.128", r"STG\.E\.(128|64)", r"MUFU")
STAGED_OUT = (r"LDGSTS\.E\.BYPASS\.128", r"STG\.E\.128")
STREAMED = (r"LDGSTS\.E\.BYPASS\.128", r"LDG\.E\.128")
ATTENTION = (
    *(r"LDGSTS\.E\.BYPASS\.128", r"LDGSTS\.E ", r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4"),  # operands
    *(r"MUFU\.EX2", r"SHFL\.BFLY", r"STG\.E\.128"),  # the softmax, whole rows of the result
)

KERNELS = (
    # A row of one warp meets in registers alone; larger ones in shared memory.
    Kernel("rowwise/rowwise.cu", "row_kernel<1, ", (*WIDE, r"SHFL\.BFLY")),
    Kernel("rowwise/rowwise.cu", "row_kernel<16, ", (*WIDE, r"SHFL\.BFLY", r"BAR\.SYNC")),
    Kernel("rowwise/rowwise.cu", "embed_kernel<1>", (*WIDE, r"SHFL\.BFLY")),
    Kernel("rowwise/rowwise.cu", "embed_kernel<16>", (*WIDE, r"SHFL\.BFLY", r"BAR\.SYNC")),
    # 16 bytes a copy and four matrices a read. float8 is for sm_120 alone of these.
    Kernel("gemm/gemm.cu", r"gemm_kernel<.*Tile<.*Code\)0", (*STAGED, r"IMMA\.16832\.S8\.S8")),
    Kernel("gemm/gemm.cu", r"gemm_kernel<.*Tile<.*Code\)1", (*STAGED, r"IMMA\.16832\.U8\.S8")),
    Kernel(
        "gemm/gemm.cu",
        r"gemm_kernel<.*Tile<.*Code\)2",
        {**dict.fromkeys(TARGETS, ()), SM120: (*STAGED, r"QMMA\.16832\.F32\.E4M3\.E4M3")},
    ),
    # Operands 16 bytes at a time into shared memory, from there by matrices; epilogues 16 bytes at a time.
    *(
        Kernel(
            "block_sparse/block_sparse.cu", rf"multiply<{operand}, .*TileOf<", (*STAGED_OUT, r"LDSM\.16\.M88\.4", mma)
        )
        for operand, mma in (
            ("__half", r"HMMA\.16816\.F32 "),
            ("__nv_bfloat16", r"HMMA\.16816\.F32\.BF16"),
            ("signed char", r"IMMA\.16832\.S8\.S8"),
        )
    ),
    # Codes 16 bytes at a time, x by lanes of 16 bytes, two numbers an instruction where codes are taken apart.
    *(
        Kernel("groupwise/groupwise.cu", rf"multiply<{operand}, {bits}, ", (*STREAMED, mma, decode))
        for operand, mma, fma in (
            ("__half", r"HMMA\.16816\.F32 ", r"HFMA2"),
            ("__nv_bfloat16", r"HMMA\.16816\.F32\.BF16", r"HFMA2\.BF16"),
        )
        for bits, decode in ((2, fma), (3, fma), (4, fma), (8, r"F2FP\.BF16" if "bf" in operand else fma))
    ),
    Kernel("groupwise/groupwise.cu", r"add_in_order", (r"LDG\.E", r"STG\.E")),
    # Both products by tensor cores; rows that begin anywhere come 4 bytes at a time.
    Kernel("attention/attention.cu", "attend<__half, ", (*ATTENTION, r"HMMA\.16816\.F32 ")),
    Kernel("attention/attention.cu", "attend<__nv_bfloat16, ", (*ATTENTION, r"HMMA\.16816\.F32\.BF16")),
)
