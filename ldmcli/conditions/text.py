"""Captions and prompts: text to image (Sec. 4.3.1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldmcli.conditions.condition import Condition
from ldmcli.core.console import warn_once
from ldmcli.core.errors import UsageError
from ldmcli.data.arrays import whole_numbers
from ldmcli.data.decode import sanitise
from ldmcli.networks.conditioners import Conditions, TextCondition


class Text(Condition):
    """A caption. τ_θ is the paper's transformer over its tokens, or a frozen encoder; the null is the empty caption."""

    name, conditioner = "text", TextCondition
    option, argument = "--prompt", "prompt"
    takes_ids = True
    column = "caption"
    missing = 'this model draws what a prompt says; give one with --prompt "…"'

    def as_list(self, given: Any) -> list[str]:
        """Prompts from Python: one, or several. Raises UsageError for what is no text."""
        found = [given] if isinstance(given, str) else [] if given is None else list(given)
        wrong = next((one for one in found if not isinstance(one, str)), None)
        if wrong is not None:
            raise UsageError(f"prompt: {wrong!r} is no text")
        return [str(one) for one in found]

    def warn(self, values: Sequence[str], conditioner: TextCondition) -> None:
        """Says which prompts are cut."""
        warn_of_cut(conditioner, values, "prompts")

    def inputs_of_ids(self, ids: Any, conditioner: TextCondition) -> dict[str, Tensor]:
        """{"ids", "mask"} (n, L), all of them seen."""
        found = checked_ids(ids, conditioner.encoder, conditioner.length)
        return {"ids": found, "mask": torch.ones_like(found, dtype=torch.bool)}


def negative_inputs(conditions: Conditions, text: str, n: int) -> dict[str, Tensor] | None:
    """Inputs of a negative prompt, n times: what guidance leads away from instead of the null; None for "".
    Raises UsageError where the model takes no prompt."""
    if not text:
        return None
    if Text.name not in conditions.entries:
        raise UsageError("--negative-prompt: this model takes no prompt")
    warn_of_cut(conditions.entries[Text.name], [text], "negative prompts")
    return conditions.prepare_one(Text.name, [text] * n)


def warn_of_cut(conditioner: TextCondition, texts: Sequence[str], what: str, remedy: str = "", total: int = 0) -> None:
    """Says once how many prompts or captions are longer than a model reads, and the first of them. `remedy` ends the
    line; total: how many there are, where `texts` are those that may be too long."""
    if cut := conditioner.cut(texts):
        are = "are" if len(cut) > 1 else "is"
        warn_once(
            f"cut {what}",
            f"{len(cut)} of {total or len(texts)} {what} {are} longer than the {conditioner.length} "
            f"tokens that the model reads, and cut; the first: “{sanitise(cut[0], 80)}”{remedy}",
        )


def checked_ids(tokens: Any, encoder: Any, length: int) -> Tensor:
    """Token ids (n, L) for a transformer that reads `length` of them. Raises UsageError for more, or unknown ids."""
    ids = whole_numbers(tokens, "tokens", 2)
    known = encoder.transformer.token_emb.num_embeddings if hasattr(encoder, "transformer") else None
    if not 0 < ids.shape[1] <= length:
        raise UsageError(f"tokens: {ids.shape[1]} a row; this model reads at most {length}")
    if known and (int(ids.min()) < 0 or int(ids.max()) >= known):
        raise UsageError(f"tokens: ids from {int(ids.min())} to {int(ids.max())}; this model knows 0 … {known - 1}")
    return ids
