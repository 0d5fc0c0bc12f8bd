"""Words of Chinese text, which has no spaces between them."""

from __future__ import annotations

import threading
import warnings
from typing import Any

_lock = threading.Lock()
_tokenizer: Any = None


def words(text: str) -> list[str]:
    """`text` cut by jieba's accurate mode with its own dictionary; joined, the words are `text` again.

    The first call reads the dictionary, which takes about a second and 60 MB.
    """
    global _tokenizer
    with _lock:
        if _tokenizer is None:
            _tokenizer = _load()
    return _tokenizer.lcut(text)


def _load() -> Any:
    with warnings.catch_warnings():
        # jieba has unescaped backslashes and looks for pkg_resources; neither matters here.
        warnings.simplefilter("ignore")
        import jieba
    # Not jieba's shared tokenizer, which a program may have taught other words, and not its `initialize`,
    # which writes to stderr and trusts a file in the folder for temporary files that anybody may have put there.
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer
