"""The slope of the loss: how it changes with each budget, through soft cuts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from transformers import PreTrainedModel

from evolkv.cache.replay import RankedPrompt
from evolkv.cache.soft import SoftReplayCache
from evolkv.evaluation.decode import not_a_number
from evolkv.evaluation.scoring import Question

#: Keeps gradients of activations above the smallest numbers that float16 holds.
_FLOAT16_SCALE = 2.0**12


def slope(
    model: PreTrainedModel,
    prompts: Sequence[RankedPrompt],
    questions: Sequence[Question],
    budgets: np.ndarray,
    sharpness: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss on each example under soft budgets of its own, and the slope of each.

    The answers' tokens go through the model and back; prompts are constants. See `evolkv.cache.soft`.

    Args:
        model: the model.
        prompts: ranked prompts.
        questions: theirs, each with a target.
        budgets: ``[examples, layers, kv_heads]`` floats, each above 0.
        sharpness: k.

    Returns:
        The losses ``[examples]``, and the derivatives of each, ``[examples, layers, kv_heads]`` float64.

    Raises:
        RunError: if what the model computes is not a number.
    """
    device = prompts[0].next_logits.device
    texts = [torch.cat([each.later, each.target]).to(device) for each in questions if each.target is not None]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)[:, :-1]
    positions = torch.tensor([each.tokens for each in prompts], device=device)[:, None]
    positions = positions + torch.arange(padded.shape[1], device=device)
    if not padded.shape[1]:
        # What follows from the prompt alone does not depend on the budgets.
        losses = [
            each.scorer.loss(prompt.next_logits[None], each) for prompt, each in zip(prompts, questions, strict=True)
        ]
        return np.array([float(loss) for loss in losses]), np.zeros(budgets.shape)
    # Recurrent states are overwritten token by token, and the way back needs each of them.
    states = torch.autograd.graph.allow_mutation_on_saved_tensors() if prompts[0].states else nullcontext()
    # Tensors made in inference mode cannot take part in what is differentiated.
    with torch.inference_mode(False), torch.enable_grad(), states:
        soft = torch.tensor(budgets, dtype=torch.float32, device=device, requires_grad=True)
        cache = SoftReplayCache(model, prompts, soft, sharpness)
        logits = model(padded, cache=cache, position_ids=positions, use_cache=True).logits
        losses = []
        for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
            first, end = len(question.later), len(texts[row]) - 1
            rows = logits[row, max(0, first - 1) : end].float()
            if first == 0:
                rows = torch.cat([prompt.next_logits[None], rows])
            losses.append(question.scorer.loss(rows, question))
        scale = _FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0
        # Rows do not meet, so the slope of the sum at a row's budgets is that of its own loss.
        (gradient,) = torch.autograd.grad(scale * torch.stack(losses).sum(), soft)
    values = np.array([float(loss.detach()) for loss in losses])
    if not (np.isfinite(values).all() and bool(gradient.isfinite().all())):
        raise not_a_number()
    return values, gradient.double().cpu().numpy() / scale
