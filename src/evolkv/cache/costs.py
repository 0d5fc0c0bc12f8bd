"""The costs of a compressed cache in numbers: bytes held, bytes read, and how much of the prefill was computed."""

from __future__ import annotations

import torch

from evolkv.cache.companion import CompanionCache
from evolkv.cache.layer import CompressedLayer
from evolkv.cache.pruning import tokens_computed


class CacheCosts:
    """The costs of a cache of compressed layers.

    Attributes:
        kv_layers: the layers with keys and values.
        companion: what a companion model holds; None where the selector takes none, and before a prompt.
    """

    kv_layers: list[CompressedLayer]
    companion: CompanionCache | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes held by keys and values, a companion's and reserved room included; states do not count."""
        return sum(layer.kv_bytes for layer in self.kv_layers) + self.companion_bytes

    @property
    def companion_bytes(self) -> int:
        """Bytes of a companion's cache, which `kv_bytes` and `read_bytes` include; 0 without one."""
        return 0 if self.companion is None else self.companion.nbytes

    @property
    def companion_bytes_by_sequence(self) -> list[int]:
        """Bytes of a companion's cache for each sequence, reserved room not included."""
        return [0] * self.kv_layers[0].batch if self.companion is None else self.companion.bytes_by_sequence

    @property
    def resident_bytes(self) -> int:
        """Bytes that a step needs of the model's own cache: what it reads; without a companion all that is held."""
        return self.kv_bytes if self.companion is None else sum(self._own_by_sequence(1))

    @property
    def kv_bytes_by_sequence(self) -> list[int]:
        """Bytes held by keys and values of each sequence of the batch, reserved room not included."""
        return self._by_sequence(0)

    @property
    def read_bytes_by_sequence(self) -> list[int]:
        """Bytes that a generated token's attention reads of each sequence: what is held, or what is chosen of it."""
        return self._by_sequence(1)

    @property
    def read_bytes(self) -> int:
        """Bytes that the attention of one generated token per sequence reads, of what is held now."""
        return sum(self.read_bytes_by_sequence)

    def _by_sequence(self, which: int) -> list[int]:
        pairs = zip(self._own_by_sequence(which), self.companion_bytes_by_sequence, strict=True)
        return [own + companion for own, companion in pairs]

    def _own_by_sequence(self, which: int) -> list[int]:
        """Return the sums over layers and heads of one of the two that `CompressedLayer.bytes_by_row` gives."""
        rows = self.kv_layers[0].batch
        totals = torch.zeros(rows, dtype=torch.long)
        for layer in self.kv_layers if rows else ():
            totals += layer.bytes_by_row()[which].view(rows, -1).sum(1)
        return totals.tolist()

    @property
    def prefill_share_by_sequence(self) -> list[float]:
        """Return, for each sequence, the share of a plain prefill that its prompt took; see `prefill_share`."""
        return [entered / plain if plain else 1.0 for entered, plain in tokens_computed(self.kv_layers)]

    @property
    def prefill_share(self) -> float:
        """Tokens of the prompts that entered each layer, summed, as a share of all: 1 unless the selector prunes.

        Where there are none, it is 1.
        """
        computed = tokens_computed(self.kv_layers)
        plain = sum(tokens for _, tokens in computed)
        return sum(tokens for tokens, _ in computed) / plain if plain else 1.0
