"""The calibration of LU-KV: how useful each entry of a prompt is to an answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evolkv.cache.replay import RankedPrompt
from evolkv.cache.utility import UtilityCache
from evolkv.evaluation.decode import not_a_number
from evolkv.evaluation.scoring import Question
from evolkv.models.forward import input_device


def utility(
    model: PreTrainedModel, prompt: RankedPrompt, question: Question, grams: dict[nn.Module, Tensor]
) -> list[np.ndarray]:
    """Return the utility of a prompt's entries to the answer; see `evolkv.cache.utility`.

    The answer is read in one call, as teacher forcing does. Of a question that comes after the prompt, the last token
    counts too, since it predicts the answer's first; the answer's own last token predicts nothing, and counts only
    where it is the only one.

    Args:
        model: the model.
        prompt: ranked entries.
        question: with a target.
        grams: of the model's attention modules; what is missing is added, so that it serves many prompts. See
            `evolkv.cache.utility.output_grams`.

    Returns:
        By layer with keys and values, ``[kv_heads, ranked]`` float32, in order of the ranking.

    Raises:
        ModelError: if the model's output projections are not found.
        RunError: if what the model computes is not a number.
    """
    assert question.target is not None
    text = torch.cat([question.later, question.target]).to(input_device(model))
    text = text[None, : max(1, len(text) - 1)]
    positions = prompt.tokens + torch.arange(text.shape[1], device=text.device)[None]
    cache = UtilityCache(model, prompt, max(0, len(question.later) - 1), grams)
    with torch.inference_mode():
        model(text, cache=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
    noted = [layer.utility for layer in cache.kv_layers if layer.utility is not None]
    if not all(bool(each.isfinite().all()) for each in noted):
        raise not_a_number()
    return [each.cpu().numpy() for each in noted]
