"""The floor of inference: what must be read and computed, at the rates that the machine was measured to have."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from lib.common import matrix_rate, seconds

#: Rows at which the model's matrices are measured: enough for the matrix units and not the memory to be the limit.
_ROWS = 256


def bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: the median over seven sums of a tensor far larger than any cache."""
    size = 2**32 if device.type == "cuda" else 2**29
    values = torch.ones(size // 4, device=device)
    values.sum()
    return size / statistics.median(seconds(values.sum, device) for _ in range(7))


@dataclass(frozen=True)
class Floor:
    """The least seconds that a step can take.

    Args:
        weight_bytes: bytes of weights that every step reads: all but input embeddings, if these are not the output's.
        layer_flops: FLOPs of one token in the matrices of all layers.
        output_flops: FLOPs of one token in the output's matrix.
        entry_flops: FLOPs of one query token per cache entry of one KV head.
        bytes_per_second: measured.
        flops_per_second: measured, in the model's own matrices and number format.
    """

    weight_bytes: int
    layer_flops: float
    output_flops: float
    entry_flops: float
    bytes_per_second: float
    flops_per_second: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Floor:
        """Measures the machine on which a model is."""
        config = model.config.get_text_config(decoder=True)
        embedding = model.get_input_embeddings().weight
        output = model.get_output_embeddings().weight
        read = sum(p.nbytes for p in model.parameters()) - (0 if output is embedding else embedding.nbytes)
        layers = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.ndim == 2)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        fold = config.num_attention_heads // config.num_key_value_heads
        return cls(
            weight_bytes=read,
            layer_flops=2 * layers,
            output_flops=2 * output.numel(),
            # Scores and the sum of values: a multiplication and an addition for each of a head's numbers.
            entry_flops=4 * fold * head_dim,
            bytes_per_second=bandwidth(model.device),
            flops_per_second=matrix_rate(model, _ROWS),
        )

    def decode(self, batch: int, cache_bytes: int, entries: float) -> float:
        """Seconds of one decode step.

        Args:
            batch: sequences.
            cache_bytes: bytes of all keys and values held.
            entries: entries held, summed over sequences, layers and KV heads.
        """
        read = (self.weight_bytes + cache_bytes) / self.bytes_per_second
        computed = (batch * (self.layer_flops + self.output_flops) + entries * self.entry_flops) / self.flops_per_second
        return max(read, computed)

    def prefill(self, tokens: int, kv_rows: int) -> float:
        """Seconds of a prompt of `tokens`, whose last one's logits are asked for; `kv_rows`: layers × KV heads."""
        # A query sees half of the prompt on average.
        attention = kv_rows * tokens**2 / 2 * self.entry_flops
        return (tokens * self.layer_flops + self.output_flops + attention) / self.flops_per_second

    def as_json(self) -> dict[str, Any]:
        """The measurements, for the record."""
        return {
            "weight_bytes": self.weight_bytes,
            "gflop_per_token": (self.layer_flops + self.output_flops) / 1e9,
            "gigabytes_per_second": self.bytes_per_second / 1e9,
            "gflop_per_second": self.flops_per_second / 1e9,
        }
