"""What scoring costs: prefill under compression against plain prefill, in paired runs.

python bench/prefill.py --json FILE [--context 4096] [--selectors snapkv,h2o,...]
"""

from __future__ import annotations

import torch

import evolkv
from common import count, finish, machine, parser, run, seconds, spread
from evolkv.selectors import SELECTORS


def main() -> None:
    """Runs the benchmark."""
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--context", type=count, default=4096)
    options.add_argument("--budget", type=count, default=128)
    options.add_argument("--pairs", type=count, default=7)
    options.add_argument("--selectors", default="snapkv", help=f"comma-separated; known: {','.join(SELECTORS)}")
    arguments = options.parse_args()

    model, _ = evolkv.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    device = model.device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    torch.manual_seed(arguments.seed)
    prompt = torch.randint(100, vocabulary, (1, arguments.context), device=device)
    result = {}
    for name in arguments.selectors.split(","):
        profile = evolkv.BudgetProfile.uniform(model, arguments.budget, selector=name)
        plain, compressed = [], []

        def prefill() -> None:
            model(prompt, use_cache=True, logits_to_keep=1)

        prefill()
        for _ in range(arguments.pairs):
            plain.append(seconds(prefill, device))
            with evolkv.compress(model, profile):
                compressed.append(seconds(prefill, device))
        result[name] = {
            "plain_seconds": spread(plain),
            "compressed_seconds": spread(compressed),
            "ratio_of_pairs": spread([c / p for c, p in zip(compressed, plain, strict=True)]),
        }
    finish(
        {
            "benchmark": "prefill",
            "machine": machine(device),
            "model": arguments.model,
            "dtype": arguments.dtype,
            "context": arguments.context,
            "budget": arguments.budget,
            "pairs": arguments.pairs,
            "selectors": result,
        },
        arguments.json,
    )


if __name__ == "__main__":
    run(main)
