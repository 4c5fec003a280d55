"""Captions and prompts: text to image (Sec. 4.3.1)."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldmcli.conditions.condition import Condition, FitData, Ranks, Spec, View
from ldmcli.core.console import say, warn_once
from ldmcli.core.errors import UsageError
from ldmcli.core.settings import MAX_TEXT_LENGTH, DataSettings, DiffusionConfig
from ldmcli.data.arrays import whole_numbers
from ldmcli.data.decode import sanitise
from ldmcli.data.mixed_captions import MixedCaptions, check_templates, lacking
from ldmcli.networks.autoencoder import Autoencoder
from ldmcli.networks.conditioners import Conditions, TextConditioner, load_tokenizer, load_vocabulary

if TYPE_CHECKING:
    from ldmcli.conditions.dataset import ConditionDataset

TOKENIZER = "tokenizer"  # folder of a run
TRIED = 1000  # rows whose mixed captions are looked at for those that are cut


class Text(Condition):
    """A caption. τ_θ is the paper's transformer over its tokens, or a frozen encoder; the null is the empty caption."""

    name, conditioner = "text", TextConditioner
    option, argument = "--prompt", "prompt"
    takes_ids = True
    static = True
    metadata_key = "prompt"
    short = False
    pipeline_tag = "text-to-image"
    column = "caption"
    missing = 'this model draws what a prompt says; give one with --prompt "…"'

    def check_sources(self, config: DiffusionConfig) -> None:
        """A tokeniser on this machine can be opened; one of a hub is not looked up here."""
        settings = config.condition
        joint = settings.text_encoder == "joint"
        source = settings.vocabulary if joint else settings.text_encoder
        if source and (Path(source).exists() or source.startswith(("/", "."))):
            (load_vocabulary if joint else load_tokenizer)(source)

    def open_early(self, config: DiffusionConfig, run: Path, ranks: Ranks) -> None:
        """Opens a tokeniser of others."""
        settings = config.condition

        def opened() -> None:
            if (run / TOKENIZER).is_dir():
                return
            if settings.text_encoder != "joint":
                load_tokenizer(settings.text_encoder)
            elif settings.vocabulary:
                load_vocabulary(settings.vocabulary)

        ranks.on_rank_0(opened)

    def available(self, rows: Any, data: DataSettings) -> bool:
        """Whether rows have captions, or all columns of the first of data.captions."""
        return rows.has(self.column) or bool(data.captions) and not lacking(rows, data.captions[:1])

    def check_columns(self, rows: Any, data: DataSettings) -> None:
        """Raises InputError where rows have no captions, or not the columns that data.captions names."""
        if data.captions:
            check_templates(rows, data.captions)
        else:
            super().check_columns(rows, data)

    def drawn(self, data: DataSettings) -> bool:
        """With data.captions."""
        return bool(data.captions)

    def from_row(self, dataset: "ConditionDataset", view: View) -> str:
        """The caption: the row's own, or with data.captions by a template that is drawn in training, else by the
        first."""
        if not dataset.config.data.captions:
            return dataset.rows.caption(view.row)
        key = dataset.random_key(view)
        return dataset.captions.drawn(view.row, key) if dataset.training else dataset.captions.first(view.row, key)

    def from_foreign_row(self, dataset: "ConditionDataset", view: View) -> str:
        """As `from_row`; the caption where the data lack a column of the first template."""
        if lacking(dataset.rows, dataset.config.data.captions[:1]):
            return dataset.rows.caption(view.row)
        return self.from_row(dataset, view)

    def report_unseen(
        self, dataset: "ConditionDataset", inputs: dict[str, Tensor] | None, conditioner: TextConditioner
    ) -> None:
        """Says which captions are cut: of those that fill the places that the model has."""
        if inputs is not None:
            texts = [dataset.rows.caption(i) for i in inputs["mask"].all(1).nonzero()[:, 0].tolist()]
        else:
            some = range(0, len(dataset.rows), -(-len(dataset.rows) // TRIED))
            texts = list(dataset.captions.all_words(some))
        total = f"{len(texts)} tried" if inputs is None else f"{len(dataset.rows)}"
        if cut := conditioner.cut(texts):
            say(
                f"data: {len(cut)} of {total} captions have more than the {conditioner.length} tokens that "
                f"the model reads, and are cut (condition.text_length): {sanitise(cut[0], 60)}"
            )

    def fit(self, data: FitData) -> Spec:
        """Length and size of the vocabulary: that of the run begun with, or what captions need."""
        inherited = self.inherit_vocabulary(data)
        if inherited is not None:
            return inherited
        captions = [data.rows.caption(i) for i in range(len(data.rows))]
        if data.config.data.captions:
            captions = list(MixedCaptions(data.rows, data.config.data).all_words(range(len(data.rows))))
        return TextConditioner.learn(data.config.condition, captions, data.rows, data.run / TOKENIZER)

    def inherit_vocabulary(self, data: FitData) -> Spec | None:
        """The vocabulary of the run that this one begins with: its word vectors mean nothing under another."""
        settings = data.config.condition
        if data.init_from is None or settings.vocabulary:
            return None
        earlier, own = data.earlier(self.name), data.init_from / TOKENIZER
        if not earlier or settings.text_encoder != "joint" or not own.is_dir():
            return None
        shutil.copytree(own, data.run / TOKENIZER, dirs_exist_ok=True)
        return {**earlier, "length": settings.text_length or earlier["length"]}

    def cost_notes(self, config: DiffusionConfig) -> list[str]:
        """Encoders and vocabularies of others, which are not opened."""
        settings = config.condition
        if settings.text_encoder != "joint":
            return [
                f"text encoder {settings.text_encoder}: not opened; the paper's transformer is counted in its place"
            ]
        if settings.vocabulary:
            return [f"vocabulary {settings.vocabulary}: not opened; a training downloads it where it is not here"]
        return []

    def tokenizer(self, run: Path) -> Any:
        """The run's own."""
        return load_tokenizer(run / TOKENIZER)

    def preview_values(self, dataset: "ConditionDataset", ids: Sequence[int], spec: Spec) -> list[str]:
        """The run's prompts, else captions."""
        return list(dataset.config.sample.prompts) or super().preview_values(dataset, ids, spec)

    def described(self, value: Any, names: Sequence[str]) -> str:
        """The prompt."""
        return str(value)

    def assumed_spec(self, config: DiffusionConfig, stage: Autoencoder) -> tuple[Spec, str]:
        """As many tokens as there can be, and words as settings say."""
        length, words = config.condition.text_length or MAX_TEXT_LENGTH, config.condition.vocabulary_size
        return {"length": length, "vocabulary": words}, (
            f"text: captions of {length} tokens from {words:,} words assumed; the data may need fewer"
        )

    def as_list(self, given: Any) -> list[str]:
        """Prompts from Python: one, or several. Raises UsageError for what is no text."""
        found = [given] if isinstance(given, str) else [] if given is None else list(given)
        wrong = next((one for one in found if not isinstance(one, str)), None)
        if wrong is not None:
            raise UsageError(f"prompt: {wrong!r} is no text")
        return [str(one) for one in found]

    def warn(self, values: Sequence[str], conditioner: TextConditioner) -> None:
        """Says which prompts are cut."""
        warn_of_cut(conditioner, values, "prompts")

    def inputs_of_ids(self, ids: Any, conditioner: TextConditioner) -> dict[str, Tensor]:
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
    warn_of_cut(cast(TextConditioner, conditions.entries[Text.name]), [text], "negative prompts")
    return conditions.prepare_one(Text.name, [text] * n)


def warn_of_cut(
    conditioner: TextConditioner, texts: Sequence[str], what: str, remedy: str = "", total: int = 0
) -> None:
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
