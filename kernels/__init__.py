"""Triton kernels, one file an operator: plain `@triton.jit` functions, their launchers and a TABLE of what is compiled.
The kernels of attention stand in two files more, forward and gradients, and so do those of group-wise weights, products
and passes over rows.

What several of them need: launch.py has devices, operands and the compiler's options, table.py what an entry of a TABLE
is, row_grid.py the int8 codes of rows, epilogue.py what linear layers do with their sums.

Nothing is imported here: `bertkern` works without Triton, and a kernel's file is loaded by the first
call that needs it.
"""
