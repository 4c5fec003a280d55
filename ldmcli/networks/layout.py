"""Boxes with categories as a condition: tokens through the transformer that text goes through (App. D.3, Tab. 17)."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError
from ldmcli.core.settings import ConditionSettings
from ldmcli.networks.conditioning import Conditioning
from ldmcli.networks.layout_tokens import Layout
from ldmcli.networks.transformer import TextTransformer, pooled, vector_of_tokens
from ldmcli.networks.unet import sinusoidal_map

MAX_OBJECTS = 30
VOCABULARY = 8192


class LayoutCondition(nn.Module):
    """Layouts -> tokens. A layout is {"bbox": (n, 4) x, y, w, h as shares of the picture, "category": n names or
    indices}; the null is one without objects.

    facts: "categories" (names in order), "length" (tokens of a sequence: three an object and two of the crop),
    "vocabulary", "logits" where a converted transformer brings its unused head along.
    """

    columns = ("objects",)
    request = "layout"

    def __init__(self, settings: ConditionSettings, facts: dict[str, Any], tokenizer=None):
        super().__init__()
        self.names: list[str] = list(facts["categories"])
        self.layout = Layout(slots=(facts["length"] - 2) // 3, vocabulary=facts["vocabulary"])
        width = settings.context_dim
        self.encoder = TextTransformer(
            self.layout.vocabulary,
            width,
            settings.text_layers,
            self.layout.length,
            settings.text_heads,
            settings.text_head_channels,
            facts.get("logits", False),
            settings.embedding_std,
        )
        if settings.smooth_places:
            self._smooth_places(settings.embedding_std)
        self.pool = vector_of_tokens(width) if settings.text_pooled else None

    @torch.no_grad()
    def _smooth_places(self, std: float) -> None:
        """Embeddings of grid points begin as random mixtures of waves over the grid, so that near points are told
        alike; those of numbers that are categories as well stay independent."""
        weight, grid = self.encoder.transformer.token_emb.weight, self.layout.grid
        waves = max(1, grid.bit_length() - 1)
        mixture = std * (2 / (4 * waves)) ** 0.5 * torch.randn(weight.shape[1], 4 * waves)
        codes = torch.einsum("wf,fp->pw", mixture, sinusoidal_map((grid, grid), waves)[0].flatten(1))
        weight[len(self.names) : grid**2] = codes[len(self.names) :]

    @staticmethod
    def learn(settings: ConditionSettings, values: list[dict], rows, folder: Path) -> dict[str, Any]:
        """Facts from the layouts of the training rows: places for the most objects seen, at most 30.

        Raises InputError where there are more categories than tokens.
        """
        names = list(rows.category_names)
        if len(names) >= VOCABULARY:
            raise InputError(f"{len(names):,} categories of objects; a layout's vocabulary has {VOCABULARY - 1:,}")
        most = max([len(value["category"]) for value in values], default=0)
        return {"categories": names, "length": 3 * min(max(most, 1), MAX_OBJECTS) + 2, "vocabulary": VOCABULARY}

    def index(self, value: str | int) -> int:
        """A category by name or, where no name is that text, by number. Raises InputError, naming close matches."""
        text = str(value)
        if isinstance(value, str) and text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text) < len(self.names):
            return int(text)
        close = difflib.get_close_matches(text, self.names, 3)
        hint = f"did you mean {', '.join(close)}?" if close else f"for example {', '.join(self.names[:8])}"
        raise InputError(f"category {text!r}: no such category among {len(self.names)}; {hint}")

    def prepare(self, layouts: list[dict]) -> dict[str, Tensor]:
        """Layouts -> {"ids": (n, length) int64}; objects beyond the places that there are do not count."""
        rows = [self.layout.tokens(one["bbox"], [self.index(name) for name in one["category"]]) for one in layouts]
        return {"ids": torch.from_numpy(np.stack(rows))}

    def null(self, n: int, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The empty layout, n times."""
        return self.prepare([{"bbox": np.zeros((0, 4)), "category": []}] * n)

    def forward(self, inputs: dict[str, Tensor]) -> Conditioning:
        tokens = self.encoder(inputs["ids"])
        return Conditioning(context=tokens, vector=self.pool(pooled(tokens)) if self.pool is not None else None)
