"""Scoring: answer -> box -> IoU. One module a profile, one registry.

`get_profile("egm-eval").score_answer(text, bbox_pixels, width, height, "scale")` gives a `Scored`. Rewards: `grounding.scoring.egm_reward`.
"""

from __future__ import annotations

from grounding.errors import UserError
from grounding.scoring import egm_eval, egm_reward, vlmevalkit
from grounding.scoring.profile import Profile, Scored

__all__ = ["PROFILES", "Profile", "Scored", "get_profile"]

PROFILES: dict[str, Profile] = {p.name: p for p in (egm_eval.PROFILE, egm_reward.PROFILE, vlmevalkit.PROFILE)}
"""Every profile by name."""

_ALIASES = {"egm": "egm-eval"}


def get_profile(name: str) -> Profile:
    """The profile of that name; `egm` is `egm-eval`. Raises `UserError` that lists the names for another."""
    profile = PROFILES.get(_ALIASES.get(name, name))
    if profile is None:
        known = ", ".join([*PROFILES, *(f"{alias} (= {name})" for alias, name in _ALIASES.items())])
        raise UserError(f"unknown scoring profile {name!r}", hint=f"Known profiles: {known}.")
    return profile
