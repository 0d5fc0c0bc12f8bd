"""lm-evaluation-harness: its tasks, on a model with a compressed cache.

Importing this module registers the model ``evolkv`` with the harness. There are three ways to get there:

* ``evolkv-lm-eval`` takes the options of ``lm_eval`` and works with every supported version of the harness::

      evolkv-lm-eval --model evolkv --model_args pretrained=smollm2-135m,profile=profile.json --tasks gsm8k

* ``lm_eval --model evolkv`` itself works with versions that look for models in the entry point group
  ``lm_eval.models``, which EvolKV declares. Version 0.4.13 does not: it knows its own models only.
* In Python, ``import evolkv.integrations.lm_eval``, then ``lm_eval.simple_evaluate(model="evolkv", ...)``; or pass it
  an `EvolKVLM`.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import evolkv
from evolkv.budgets import BudgetSpec, read_budget
from evolkv.cache import CompressedCache, compress
from evolkv.errors import ModelError, UsageError
from evolkv.evaluation.decode import target_log_probs
from evolkv.methods import chosen_method
from evolkv.models import ALIASES, gguf
from evolkv.profile import BudgetProfile
from evolkv.tasks.prompts import encode_text

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise UsageError(
        f"lm-evaluation-harness cannot be imported ({error}); install it with: pip install 'evolkv[lm-eval]'"
    ) from error

_log = logging.getLogger(__name__)

#: (context and continuation as texts, or None), tokens of the context, tokens of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Context = tuple[int, ...]


@register_model("evolkv")
class EvolKVLM(HFLM):
    """The harness's ``hf`` model, under a profile or a heuristic.

    Generation runs inside `evolkv.compress`. For a log-likelihood the context is prefilled and compressed, and the
    continuation is scored against what was kept, teacher-forced; one forward call over both would compress nothing,
    since every token of a prompt sees the whole prompt. A context with several continuations is prefilled once, and
    `batch_size` counts continuations (those of one context stay together, however many). Log-probabilities are
    computed in float32.

    Without `profile` and `method`, and with ``method=full``, it is the ``hf`` model and nothing else, with one
    exception: no prompt ends in an EOS that a tokenizer appends, or begins with two BOS.

    Args:
        pretrained: what ``hf`` takes; or an alias (see `evolkv.models.list_models`) or a .gguf file, which are
            converted as in `evolkv.load_model`.
        profile: path of a profile, or the profile.
        method: instead of a profile, a method of `evolkv eval`: a selector, ``allocator+selector``, ``pyramidkv``.
        budget: mean cache entries per KV head, or a share of each prompt, such as ``10%``. Needed with a heuristic
            `method`; a profile is expanded to it.
        device: default: "cuda" if there is one, else "cpu".
        kwargs: everything else that ``hf`` takes.

    Raises:
        UsageError: for settings that do not go together, or an unknown method.
        ProfileError: for a file that is no profile, or one of another model.
        ModelError: for a model that cannot be compressed, or a .gguf file that does not exist.
    """

    def __init__(
        self,
        pretrained: Any,
        profile: str | os.PathLike[str] | BudgetProfile | None = None,
        method: str | None = None,
        budget: BudgetSpec | None = None,
        device: str | None = None,
        **kwargs: Any,
    ):
        budget = None if budget is None else read_budget(budget)
        # The harness makes a number of a name that looks like one.
        named = profile if profile is None or isinstance(profile, BudgetProfile) else str(profile)
        chosen = chosen_method(named, None if method is None else str(method), budget)
        if isinstance(pretrained, str):
            pretrained = _folder_of(pretrained)
        super().__init__(pretrained, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **kwargs)
        self.method, self.budget = chosen, budget
        with self._compressed():  # a model that cannot be compressed is refused here, at once
            pass

    def _compressed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.method.is_full else compress(self.model, self.method, self.budget)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a text, of which the last `left_truncate_len`; without an EOS that the tokenizer appends."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if special is False:
            ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        else:
            ids = encode_text(self.tokenizer, string)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids of texts as `tok_encode` gives them, padded to one length, and their attention mask."""
        rows = [self.tok_encode(string) for string in strings]
        if truncation:
            rows = [row[: self.tokenizer.model_max_length] for row in rows]
        if left_truncate_len:
            rows = [row[-left_truncate_len:] for row in rows]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._compressed():
            return super()._model_generate(*args, **kwargs)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As in the harness.

        Raises:
            UsageError: under a profile or method.
        """
        if not self.method.is_full:
            raise UsageError(
                "this task scores every token of a text after all tokens before it (loglikelihood_rolling): it has no "
                "prompt that could be compressed; run it without profile and method, or choose a task that generates "
                "or scores continuations"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say about the model: as in the harness, and what the cache was compressed to."""
        info = super().get_model_info()
        if self.method.selector is None:
            return info
        profile = self.method.profile
        compression = {
            "version": evolkv.__version__,
            "method": self.method.name,
            "selector": self.method.selector.to_dict(),
            "mean_budget": self.budget or self.method.share or (profile and profile.mean_budget),
        }
        return {**info, "evolkv": compression}

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.method.is_full or not requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        pairs = self._fitted(requests)
        waiting: dict[Context, list[int]] = defaultdict(list)
        for number, (context, _) in enumerate(pairs):
            waiting[context].append(number)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm or self.rank != 0, desc="Running compressed requests") as bar:
            for contexts in _batches(waiting, self._rows_at_once(requests)):
                numbers = [waiting[context] for context in contexts]
                scores = self._score(contexts, [[pairs[number][1] for number in row] for row in numbers])
                for number, answer in zip([number for row in numbers for number in row], scores, strict=True):
                    answers[number] = answer
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
                    bar.update()
        return [answers[number] for number in range(len(pairs))]

    def _fitted(self, requests: list[Request]) -> list[tuple[Context, list[int]]]:
        """Contexts and continuations, contexts cut from the left to what the model has room for, as ``hf`` does."""
        pairs, cut = [], 0
        for texts, context, continuation in requests:
            # The last token of a continuation is never fed to the model.
            room = self.max_length + 1 - len(continuation)
            if not context or not continuation or room < 1:
                raise UsageError(
                    f"a continuation has {len(continuation)} tokens after a context of {len(context)}: expected at "
                    f"least one each, and no more than {self.max_length} of the continuation, in {str(texts)[:200]}"
                )
            cut += len(context) > room
            pairs.append((tuple(context[-room:]), continuation))
        if cut:
            _log.warning("%d of %d contexts are cut to the model's %d tokens", cut, len(pairs), self.max_length)
        return pairs

    def _rows_at_once(self, requests: list[Request]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        longest = max(requests, key=lambda request: len(request[1]) + len(request[2]))
        return int(self._detect_batch_size([longest], 0))

    def _score(
        self, contexts: Sequence[Context], continuations: Sequence[Sequence[list[int]]]
    ) -> list[tuple[float, bool]]:
        """Summed log-probability of every continuation, and whether greedy decoding would have given it.

        Args:
            contexts: distinct contexts; prefilled as one batch.
            continuations: those of each context.
        """
        place = self.device
        mixed = torch.autocast(place.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None)
        rows = torch.tensor([row for row, targets in enumerate(continuations) for _ in targets], device=place)
        targets = [torch.tensor(target, device=place) for several in continuations for target in several]
        with torch.inference_mode(), mixed, self._compressed():
            cache, logits = self._prefill(contexts)
            cache.batch_select_indices(rows)
            best = [logits[rows].argmax(-1)[:, None]]

            def watched(*args: Any, **kwargs: Any) -> Any:
                output = self.model(*args, **kwargs)
                best.append(output.logits.argmax(-1))
                return output

            lengths = [len(contexts[row]) for row in rows.tolist()]
            log_probs = target_log_probs(watched, cache, logits[rows], lengths, targets)
        greedy = torch.cat(best, dim=1)
        return [
            (float(scored.sum()), bool((chosen[: len(target)] == target).all()))
            for scored, chosen, target in zip(log_probs, greedy, targets, strict=True)
        ]

    def _prefill(self, contexts: Sequence[Context]) -> tuple[CompressedCache, Tensor]:
        """The compressed cache of contexts, padded on the left, and the logits after each, ``[contexts, vocab]``."""
        width = max(map(len, contexts))
        ids = torch.tensor([[0] * (width - len(context)) + list(context) for context in contexts], device=self.device)
        lengths = torch.tensor([[len(context)] for context in contexts], device=self.device)
        real = (torch.arange(width, device=self.device) >= width - lengths).long()
        position = (real.cumsum(-1) - 1).clamp(min=0)
        output = self.model(ids, attention_mask=real, position_ids=position, use_cache=True, logits_to_keep=1)
        return output.cache, output.logits[:, -1].float()


def _folder_of(pretrained: str) -> str:
    """The folder that an alias or a .gguf file is converted to; anything else is left to the harness."""
    path = Path(os.path.expanduser(pretrained))
    if pretrained in ALIASES:
        entry = ALIASES[pretrained]
        return str(gguf.converted(entry.paths(pretrained), pretrained, entry.sha256))
    if path.is_file():
        return str(gguf.converted([path], path.name.removesuffix(".gguf")))
    if path.suffix == ".gguf":
        raise ModelError(f"no such model file: {pretrained!r}; give the path of a .gguf file")
    return pretrained


def _batches(waiting: dict[Context, list[int]], rows: int) -> Iterator[list[Context]]:
    """Contexts in batches of at most so many continuations, but at least one context; the longest first."""
    batch: list[Context] = []
    taken = 0
    for context in sorted(waiting, key=len, reverse=True):
        if batch and taken + len(waiting[context]) > rows:
            yield batch
            batch, taken = [], 0
        batch.append(context)
        taken += len(waiting[context])
    if batch:
        yield batch
