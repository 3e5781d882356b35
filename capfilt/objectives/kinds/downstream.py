"""Which families can do which downstream task: the table, and the refusal of a pair that is not in it."""

from __future__ import annotations

FAMILIES_OF: dict[str, tuple[str, ...]] = {
    "retrieval": ("blip", "blip2", "albef", "clip", "vilt", "vlmo", "xvlm"),
    "captioning": ("blip", "blip2", "xvlm"),
    "vqa": ("blip", "albef", "vilt", "vlmo", "xvlm"),
    "nlvr2": ("blip", "albef", "vilt", "vlmo", "xvlm"),
    "entailment": ("blip", "albef", "vilt", "vlmo", "xvlm"),
    "grounding": ("xvlm",),
    "dialog": ("blip", "albef", "vilt", "vlmo", "xvlm"),
}
"""By the task; a head of a task (`models/heads`) counts by the family of its base."""


def not_in_table(task: str, family: str) -> str:
    """Why a family cannot do a task, as a sentence with those that can; "" where it can, and of any other task."""
    able = FAMILIES_OF.get(task, (family,))
    if family in able:
        return ""
    return f"the family {family} cannot do {task}: {' and '.join(filter(None, (', '.join(able[:-1]), able[-1])))} can."
