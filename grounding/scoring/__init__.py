"""Score answers: text -> box -> IoU. Each profile has a module, and `PROFILES` lists them all by name.

`get_profile("egm-eval").score_answer(text, bbox_pixels, width, height, "scale")` returns a `Scored`. Rewards are computed by
`grounding.scoring.egm_reward`.
"""

from __future__ import annotations

from grounding.errors import UserError
from grounding.scoring import answer_after_thinking, egm_eval, egm_reward, own_profile, vlmevalkit
from grounding.scoring.profile import Profile, Scored

__all__ = ["PROFILES", "Profile", "Scored", "get_profile", "remapped"]

PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        egm_eval.PROFILE,
        egm_eval.PIXELS,
        egm_eval.RESIZED,
        answer_after_thinking.PROFILE,
        answer_after_thinking.PIXELS,
        egm_reward.PROFILE,
        vlmevalkit.PROFILE,
    )
}
"""Every built-in profile, by name."""

_ALIASES = {"egm": "egm-eval"}


def get_profile(name: str) -> Profile:
    """Return the profile called `name`. `egm` means `egm-eval`; `FILE.py` or `FILE.py:NAME` is a user's own profile. Raises `UserError` if
    there is none.
    """
    if own_profile.names_file(name):
        return own_profile.of_name(name)
    profile = PROFILES.get(_ALIASES.get(name, name))
    if profile is None:
        known = ", ".join([*PROFILES, *(f"{alias} (= {name})" for alias, name in _ALIASES.items())])
        raise UserError(
            f"unknown scoring profile {name!r}", hint=f"Known profiles: {known}; or FILE.py for your own profile."
        )
    return profile


_RESIZED = {egm_eval.PROFILE.name: egm_eval.RESIZED.name}
"""Variants for Qwen2.5-VL, keyed by the profile that reads 0..1000"""

_IN_PIXELS = {
    egm_eval.PROFILE.name: egm_eval.PIXELS.name,
    answer_after_thinking.PROFILE.name: answer_after_thinking.PIXELS.name,
}
"""Variants for models that answer in pixels, keyed by the profile that reads 0..1000"""


def remapped(name: str, box_remap: str) -> str:
    """Return the name of the variant of profile `name` that reads answers as `box_remap` says: `scale`, `keep` or `resized`. If it is
    empty, return the name itself.

    The way of reading is part of the profile's name, so stored rows record it. Raises `UserError` if the profile has no such variant.
    """
    profile, option = get_profile(name).name, "--box-remap"
    if box_remap == "":
        return name
    if box_remap == "keep":
        if profile in _IN_PIXELS.values():
            return name
        if profile in _IN_PIXELS:
            return _IN_PIXELS[profile]
        raise UserError(f"profile {profile} always scales", field=option, hint=f"Known for: {', '.join(_IN_PIXELS)}.")
    if box_remap == "resized":
        if profile in _RESIZED.values():
            return name
        if profile in _RESIZED:
            return _RESIZED[profile]
        raise UserError(
            f"profile {profile} cannot read boxes in pixels of resized pictures",
            field=option,
            hint="Known for: egm-eval.",
        )
    if box_remap == "scale":
        if profile in (*_IN_PIXELS.values(), *_RESIZED.values()):
            raise UserError(f"profile {profile} already reads pixels", field=option, hint="Set only one of the two.")
        return name
    hint = "Known: scale, keep, resized."
    if box_remap == "inverse":  # true boxes are always in pixels here
        hint += " If answers are in pixels and true boxes in 0..1000, use --box-remap keep --truth relative."
    raise UserError(f"unknown box remap {box_remap!r}", field=option, hint=hint)
