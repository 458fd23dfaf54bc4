"""CTranslate2's BERT encoder with int8 weights and activations."""

from __future__ import annotations

from typing import Any

import ctranslate2
import numpy as np
from transformers import BertConfig

from .exporting import artifacts
from .torch_engine import ModelEngine


class Int8(ModelEngine):
    packages = ("ctranslate2",)

    def load(self, folder: str) -> None:
        from ctranslate2.converters import TransformersConverter

        target = artifacts(folder, f"ctranslate2-{ctranslate2.__version__}")
        if not (target / "model.bin").exists():
            # The converter asks for an attribute that transformers 5 has dropped from its configurations.
            if not hasattr(BertConfig, "position_embedding_type"):
                BertConfig.position_embedding_type = "absolute"
            TransformersConverter(folder).convert(str(target), quantization="int8", force=True)
        self.encoder = ctranslate2.Encoder(
            str(target), device="cpu", compute_type="int8", inter_threads=1, intra_threads=self.threads
        )
        self.notes["compute_type"] = self.encoder.compute_type

    def convert(self, batch: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
        ids = np.ascontiguousarray(batch["input_ids"], np.int32)
        lengths = np.ascontiguousarray(batch["attention_mask"].sum(1), np.int32)
        types = [row.tolist() for row in batch.get("token_type_ids", np.zeros_like(ids))]
        view = ctranslate2.StorageView.from_array
        # The arrays are kept beside the views, which only point into them.
        return (view(ids), view(lengths), types), (ids, lengths)

    def call(self, batch: Any) -> tuple[np.ndarray, np.ndarray | None]:
        (ids, lengths, types), _ = batch
        out = self.encoder.forward_batch(ids, lengths=lengths, token_type_ids=types)
        pooled = None if out.pooler_output is None else np.array(out.pooler_output)
        return np.array(out.last_hidden_state), pooled
