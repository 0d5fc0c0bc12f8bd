"""CMA-ES (arXiv 1604.00772) as the strategies use it: silent, reproducible, never stopping by itself."""

from __future__ import annotations

from typing import Any

import cma
import numpy as np
from numpy.typing import NDArray


def cma_es(x0: NDArray[np.float64], sigma: float, population: int, seed: int | list[int], **options: Any) -> Any:
    """Return a `cma.CMAEvolutionStrategy` that draws from a generator of its own.

    pycma draws from NumPy's global generator unless told otherwise, and reads options from a file in the
    working folder unless its verbosity is −10. Its stopping criteria only matter to a caller of `stop()`.

    Args:
        x0: initial mean, shape (n,).
        sigma: initial standard deviation, in units of `x0`.
        population: samples per generation.
        seed: seed of the random numbers, or a list of ints that make one.
        **options: further pycma options.
    """
    rng = np.random.default_rng(seed)
    return cma.CMAEvolutionStrategy(
        x0,
        sigma,
        {
            "popsize": population,
            "seed": np.nan,
            "randn": lambda *shape: rng.standard_normal(shape),
            "verbose": -10,
            "verb_log": 0,
            # pycma mirrors samples of small populations, and complains where a generation is not told.
            "CMA_mirrors": 0,
            **options,
        },
    )
