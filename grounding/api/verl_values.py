"""Check values of `engineOverrides`: whether Hydra reads one value, and whether verl accepts it for the key. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress

CHOICES: Mapping[str, tuple[str, ...]] = {
    "actor_rollout_ref.actor.kl_loss_type": ("abs", "kl", "k1", "k2", "k3", "low_var_kl", "mse"),
    "actor_rollout_ref.actor.loss_agg_mode": (
        "seq-mean-token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "token-mean",
        "token-sum",
    ),
    "actor_rollout_ref.actor.optim.lr_scheduler_type": ("constant", "cosine"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": (
        "bypass_mode",
        "cispo",
        "clip_cov",
        "dppo_kl",
        "dppo_tv",
        "dro",
        "geo_mean",
        "gpg",
        "gspo",
        "kl_cov",
        "sapo",
        "vanilla",
    ),
    "actor_rollout_ref.rollout.mode": ("async",),
    "algorithm.adv_estimator": (
        "gdpo",
        "gpg",
        "grpo",
        "grpo_passk",
        "grpo_vectorized",
        "opo",
        "optimal_token_baseline",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "remax",
        "rloo",
        "rloo_vectorized",
        "tir_optimal_token_baseline",
    ),
}
"""Keys for which verl accepts only certain words -> those words; for `adv_estimator`, only those that need no critic. Tests compare them
with verl's source.
"""
POSITIVE = frozenset(
    {
        "actor_rollout_ref.actor.ppo_epochs",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
        "actor_rollout_ref.rollout.temperature",
        "actor_rollout_ref.rollout.val_kwargs.n",
        "reward.num_workers",
        "trainer.save_freq",
    }
)
"""Keys whose number must be above 0. With 0 or less, verl divides by zero, waits for no one, trains nothing or saves nothing."""
SHARES = frozenset({"actor_rollout_ref.rollout.gpu_memory_utilization", "actor_rollout_ref.rollout.top_p"})

_SWEEP = re.compile(r"\s*(choice|range|interval|glob|shuffle|sort|tag)\s*\(")
_PLAIN = re.compile(r"[\w./:\\+%*@?|$\-\s]*", re.ASCII)
_ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")
_WITHIN = str.maketrans(dict.fromkeys("()[]{},:", " "))
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_PAIRS = {")": "(", "]": "[", "}": "{"}


def value_problem(key: str, value: str, kind: str) -> str | None:
    """Return the problem of a key's value; None if there is none. `kind` is the kind of verl's own value, as in `verl_keys.txt`."""
    problem = _grammar(value)
    text = value.strip()
    if problem is not None:
        return f"{key}: {problem}"
    if kind == "section":
        return f"{key} is a section of verl's configuration. Name one of its keys."
    if text.startswith("${") or text == "null":
        return None
    if key in CHOICES and _unquoted(text) not in CHOICES[key]:
        return f"{key}: {text or 'nothing'} is not a known value. Choose one of {', '.join(CHOICES[key])}."
    wanted = _of_kind(text, kind) or _bounds(key, text)
    return None if wanted is None else f"{key}: {text or 'nothing'} is not valid. It takes {wanted}."


def _of_kind(text: str, kind: str) -> str | None:
    """Return a description of the values of this kind if `text` is not one of them; otherwise None."""
    if kind == "bool":
        return None if text.lower() in ("true", "false", "0", "1") else "true or false"
    if kind == "number":
        return None if _number(text) is not None else "a number"
    if kind == "list":
        return None if text.startswith("[") else "a list in brackets"
    if kind == "mapping":
        return None if text.startswith("{") else "a mapping in braces"
    return None


def _bounds(key: str, text: str) -> str | None:
    """Return a description of the valid numbers for a key if `text` is outside its bounds; otherwise None."""
    number = _number(text)
    if key in POSITIVE and not (number is not None and number > 0):
        return "a number above 0"
    if key in SHARES and not (number is not None and 0 < number <= 1):
        return "a number above 0 and at most 1"
    return None


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text)
    return None


def _unquoted(text: str) -> str:
    return text[1:-1] if _QUOTED.fullmatch(text) else text


def _grammar(value: str) -> str | None:
    """Return why Hydra would not read `value` as one value; None if it would."""
    if _SWEEP.match(value):
        return "Hydra would read this as a sweep, but a job is one run. Give one value."
    rest = re.sub(r"\$\{[^{}]*\}", "x", _ESCAPED.sub("x", _QUOTED.sub("\0", value)))
    if "'" in rest or '"' in rest:
        return "a quote is not closed. Close it, or write \\ before it."
    open_: list[str] = []
    for sign in rest:
        if sign in "([{":
            open_.append(sign)
        elif sign in _PAIRS and (not open_ or open_.pop() != _PAIRS[sign]):
            return f"{sign} has no opening bracket. Put the text into quotes."
        elif sign == "," and not open_:
            return "Hydra would read several values as a sweep, but a job is one run. Put a list into [brackets], or a text into quotes."
    if open_:
        return f"{open_[-1]} is not closed. Close it, or put the text into quotes."
    text = rest.strip()
    several = text.startswith(("[", "{"))
    words = rest.translate(_WITHIN).split() if several else [text]
    if "\t" in rest or (text.startswith("{") and ":" not in text and text != "{}"):
        return "Hydra cannot read this text without quotes. Put the text into quotes."
    if not all(word == "\0" or _PLAIN.fullmatch(word) for word in words) or (several and text[-1] not in "]}"):
        return "Hydra cannot read such characters without quotes. Put the text into quotes."
    return None
