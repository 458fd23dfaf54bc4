"""bertkern: pruned and quantized BERT models, really fast."""

__version__ = "0.1.0"
