"""Words of a report that a newcomer needs explained."""

from __future__ import annotations

_WORDS = {
    "budget": "cache entries (tokens) that each KV head keeps of a prompt, on average over all heads",
    "selector": "the rule that ranks a prompt's tokens, so that a budget can cut the ranking: snapkv, chunkkv, …",
    "profile": "the budgets of all layers and heads in one file, with their selector",
    "logprob": "metric: mean probability of the tokens of the reference answer",
    "contains": "metric: 1 if the answer contains the reference, else 0",
    "exact_match": "metric: 1 if the answer is the reference, else 0",
    "fidelity": "metric: how much of the full cache's own behaviour is kept; needs no reference answers",
    "agreement": "metric: share of the full cache's own next tokens that are also the compressed cache's",
    "niah": "task: find a number hidden in a long text",
    "aware": "protocol: the question is part of the prompt when the prompt is compressed",
    "agnostic": "protocol: the prompt is compressed before the question is seen",
    "joint": "strategy: CMA-ES over all budgets at once, always at exactly the target memory",
    "evolkv": "strategy: the paper's Algorithm 1, layer group by layer group; among methods, the evolved profile",
    "gradient": "budgets found by following the slope of the loss through soft cuts",
    "lukv": "allocation without evolution: budgets follow each head's measured utility",
    "pyramid": "allocation without search: lower layers keep more",
    "uniform": "allocation without search: every head keeps the same number",
    "95 % interval": "where the mean would lie with other examples of the same kind, 19 times in 20",
}
_ALWAYS = ("budget", "selector", "profile", "95 % interval")


def glossary(text: str) -> list[tuple[str, str]]:
    """Return (word, meaning) pairs for the words that stand in a text, and for those that every report needs."""
    spoken = set(text.replace(":", " ").replace(",", " ").replace("+", " ").split())
    return [(word, meaning) for word, meaning in _WORDS.items() if word in _ALWAYS or word in spoken]
