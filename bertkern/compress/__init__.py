"""Methods that make a model smaller: each prepares, trains or calibrates in torch, then converts for the kernels."""
