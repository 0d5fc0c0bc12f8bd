"""What bounded prefill costs: score, peak memory and time of prompts read in chunks, against reading them at once.

python bench/bounded_prefill.py --json FILE [--context 1600] [--budget 128] [--chunks 128,512] [--selectors NAMES]

The peak is over layers and forward calls: what the layers hold, with the new tokens of the one that is at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

import evolkv
from common import count, counts, finish, machine, parser, run, seconds, spread
from evolkv.evaluation.decode import end_tokens, greedy
from evolkv.evaluation.engine import text_score
from evolkv.models import describe_model
from evolkv.models.forward import given_cache
from evolkv.tasks import encode_prompt, get_task


class Peak:
    """The most entries that a head held, and the most bytes that all held."""

    def __init__(self, bytes_per_token: int):
        self.bytes_per_token = bytes_per_token
        self.entries = self.kv_bytes = 0

    def see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each attention: what is held, and the tokens that come."""
        layers = given_cache(kwargs)[1].layers
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        new = hidden.shape[1]
        held = max((group.keys.shape[1] for group in layers[module.layer_idx].groups), default=0)
        self.entries = max(self.entries, held + new)
        self.kv_bytes = max(self.kv_bytes, sum(layer.kv_bytes for layer in layers) + new * self.bytes_per_token)


@contextmanager
def watched(model: PreTrainedModel, peak: Peak) -> Iterator[None]:
    """Has `peak` see every attention of the model."""
    layers = model.get_decoder().layers
    handles = [layer.self_attn.register_forward_pre_hook(peak.see, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=1600)
    options.add_argument("--budget", type=count, default=128)
    options.add_argument("--chunks", type=counts, default=[128, 512], metavar="N,N")
    options.add_argument("--samples", type=count, default=20)
    options.add_argument("--selectors", default="snapkv,keydiff")
    options.add_argument("--profile", default=None, help="a profile, beside the selectors; --budget expands it")
    arguments = options.parse_args()

    model, tokenizer = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    device, info = model.device, describe_model(model)
    per_token = info.num_kv_heads * 2 * info.head_dim * model.dtype.itemsize
    examples = get_task(f"niah:context={arguments.context}").examples(
        "report", arguments.samples, tokenizer, arguments.seed
    )
    end = end_tokens(model, tokenizer)
    profiles = {
        name: evolkv.BudgetProfile.uniform(model, arguments.budget, selector=name)
        for name in arguments.selectors.split(",")
    }
    if arguments.profile is not None:
        profiles["profile"] = evolkv.BudgetProfile.load(arguments.profile).expand(arguments.budget)
    # Budgets that cover every prompt: nothing is evicted, nor ranked.
    full = evolkv.BudgetProfile.uniform(model, info.max_context, selector="streaming_llm")
    runs: dict[str, Any] = {"full": (full, None)}
    for name, profile in profiles.items():
        runs[f"{name} at once"] = (profile, None)
        runs |= {f"{name} in chunks of {n}": (profile, n) for n in arguments.chunks}

    rows = {}
    for name, (profile, chunk) in runs.items():
        scores, times, peak = [], [], Peak(per_token)
        for example in examples:
            ids = encode_prompt(tokenizer, example).to(device)

            def prefill(cache: Any, ids: torch.Tensor = ids) -> Any:
                return model(ids, **cache.as_argument, use_cache=True, logits_to_keep=1)

            # Timed without anybody watching.
            timed = evolkv.CompressedCache(model, profile, prefill_chunk=chunk)
            times.append(seconds(lambda timed=timed: prefill(timed), device))
            cache = evolkv.CompressedCache(model, profile, prefill_chunk=chunk)
            with watched(model, peak):
                output = prefill(cache)
            answer = greedy(model, cache, output.logits[:, -1], [ids.shape[1]], [example.max_new_tokens], end)[0]
            scores.append(text_score(example.metric, tokenizer.decode(answer, skip_special_tokens=True), example))
        rows[name] = {
            "score": mean(scores),
            "n": len(scores),
            "peak_entries_per_head": peak.entries,
            "peak_kv_bytes": peak.kv_bytes,
            "prefill_seconds": spread(times),
        }
    finish(
        {
            "benchmark": "bounded_prefill",
            "machine": machine(device),
            "model": arguments.model,
            "dtype": arguments.dtype,
            "context": arguments.context,
            "budget": arguments.budget,
            "rows": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
