"""The transformers that the compressed cache needs, which is newer than what the rest of EvolKV needs.

Serving engines pin older ones. Profiles, selectors and allocators work with these, so that a plugin can use them.
"""

from __future__ import annotations

import re

import transformers

from evolkv.errors import RunError

#: The lowest version whose cache layers and masks the compressed cache is made for.
LOWEST = (5, 24)


def check_transformers(version: str = transformers.__version__) -> None:
    """Check that transformers is new enough for the compressed cache.

    Args:
        version: of transformers. Default: the installed one.

    Raises:
        RunError: it is older than `LOWEST`.
    """
    installed = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if installed < LOWEST:
        lowest = ".".join(map(str, LOWEST))
        raise RunError(
            f"EvolKV's compressed cache needs transformers {lowest} or later, but {version} is "
            f"installed; run pip install 'transformers>={lowest}' in an environment of its own if another package pins "
            "the old one. Profiles, selectors and allocators work with both"
        )
