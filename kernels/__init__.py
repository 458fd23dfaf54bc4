"""Triton kernels, one file an operator: plain `@triton.jit` functions, their launchers and a TABLE of what is compiled.
Those of attention stand in two files more, its forward kernel and its gradients'.

Nothing is imported here: `bertkern` works without Triton, and a kernel's file is loaded by the first
call that needs it.
"""
