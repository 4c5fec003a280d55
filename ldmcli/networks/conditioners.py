"""What the diffusion model is conditioned on (Sec. 3.3): rows and requests become tokens, planes and vectors.

The UNet knows three things: `context` (B, M, d) for cross-attention, `concat` (B, c, h, w) beside z_t on the input,
and `vector` (B, v) added to the time embedding. Several conditions at once: tokens join, planes stack, vectors add.
Each has its own null, which takes its place at random while training and in the unconditional half of guidance.
A condition is one class and one line in `CONDITIONERS`.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldmcli.core.errors import InputError, ModelError, UsageError
from ldmcli.core.settings import MAX_TEXT_LENGTH, ConditionSettings
from ldmcli.networks.conditioning import Conditioner, Conditioning, Encode
from ldmcli.networks.layout import LayoutConditioner
from ldmcli.networks.names import hint, place_of
from ldmcli.networks.spatial_conditioners import LowResConditioner, MaskedConditioner, SemanticMapConditioner
from ldmcli.networks.text_encoder import TextTransformer, pooled, vector_of_tokens

READ_CHARACTERS = 50_000  # of a caption: what lies behind them is far past any text length
TYPOGRAPHIC = str.maketrans("’‘“”–—", "''\"\"--")  # typographic signs and the keys that people press for them


def train_vocabulary(captions: list[str], size: int, folder: Path) -> None:
    """A lower-cased WordPiece vocabulary (BERT's way) learned from captions, saved as a tokeniser folder. Typographic
    quotes and dashes count as the typed ones."""
    from tokenizers import BertWordPieceTokenizer

    captions = [caption.translate(TYPOGRAPHIC) for caption in captions]
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    words = {word for caption in set(captions) for word, _ in split(tokenizer.normalize(caption))}
    # the trainer breaks ties by the numbers of pieces, and numbers those inside words in the order of a hash map: given
    # as special they have their numbers beforehand, and equal captions an equal vocabulary
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inner]
    tokenizer.train_from_iterator(
        captions, vocab_size=size, min_frequency=1, show_progress=False, special_tokens=special
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}\n')


def quote_variants(tokenizer) -> dict[int, int]:
    """For `str.translate`: quotes and dashes that a vocabulary lacks -> the typed or typographic twin that it has."""
    twins = [pair for a, b in TYPOGRAPHIC.items() for pair in ((a, b), (b, a))]
    known = {a: tokenizer.convert_tokens_to_ids(chr(a)) != tokenizer.unk_token_id for pair in twins for a in pair}
    return {a: b for a, b in twins if known[b] and not known[a]}


def load_tokenizer(source: str | Path):
    """A fast tokeniser from a folder, a hub id, or a bare WordPiece vocabulary (a .txt file, or a folder with vocab.txt
    and nothing that names a class: BERT's, lower-cased). Raises InputError when there is none."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, BertTokenizerFast  # type: ignore[attr-defined]
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        words = _bare_vocabulary(Path(source))
        return AutoTokenizer.from_pretrained(str(source)) if words is None else BertTokenizerFast(str(words))
    except Exception as error:  # readers of two libraries raise many kinds for files that are none of theirs
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source}: no tokeniser could be loaded from there ({reason})") from error


def _bare_vocabulary(path: Path) -> Path | None:
    if path.is_dir():
        alone = not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "config.json"))
        return path / "vocab.txt" if alone and (path / "vocab.txt").is_file() else None
    return path if path.is_file() and path.suffix == ".txt" else None


def load_vocabulary(source: str):
    """`load_tokenizer` for `condition.vocabulary`, whose error says what to give instead."""
    try:
        return load_tokenizer(source)
    except InputError as error:
        raise InputError(
            f"condition.vocabulary = {error}; without a network give a folder with that tokeniser, or its vocab.txt: "
            "--set condition.vocabulary=FILE; or --set condition.vocabulary= to learn one from the captions"
        ) from error


class TextConditioner(Conditioner):
    """Captions -> tokens, by the paper's transformer trained along ("joint") or a frozen encoder of transformers.

    The null is the empty caption. `spec` keeps what use needs beside the weights: length, vocabulary size, "logits"
    where a converted transformer brings its unused head along. tokenizer None: only tokens can be given.
    """

    guidance_rank = 3
    gives_tokens = True
    _frozen: Any

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer):
        super().__init__()
        self.length, self.tokenizer = spec["length"], tokenizer
        self._one_at_a_time = threading.Lock()  # fast tokenisers refuse two threads
        self.joint = settings.text_encoder == "joint"
        if self.joint:
            width = settings.context_dim
            self.encoder: nn.Module = TextTransformer(
                spec["vocabulary"],
                width,
                settings.text_layers,
                self.length,
                settings.text_heads,
                settings.text_head_channels,
                spec.get("logits", False),
                settings.embedding_std,
            )
        else:
            frozen = _load_frozen(settings.text_encoder)
            object.__setattr__(self, "_frozen", frozen)  # not a submodule: never trained, saved or averaged
            width = frozen.config.hidden_size
            self.encoder = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, settings.context_dim))
        self.pool = vector_of_tokens(settings.context_dim) if settings.text_pooled else None

    @staticmethod
    def gives_vector(settings: ConditionSettings) -> bool:
        """As settings say: the tokens, pooled."""
        return settings.text_pooled

    @staticmethod
    def learn(settings: ConditionSettings, captions: list[str], rows, folder: Path) -> dict[str, Any]:
        """Facts from the captions of the training rows; saves the tokeniser into `folder`."""
        distinct = sorted({caption[:READ_CHARACTERS] for caption in captions})
        if settings.text_encoder != "joint":
            tokenizer = load_tokenizer(settings.text_encoder)
        elif settings.vocabulary:
            tokenizer = load_vocabulary(settings.vocabulary)
        else:
            train_vocabulary(distinct, settings.vocabulary_size, folder)
            tokenizer = load_tokenizer(folder)
        tokenizer.save_pretrained(str(folder))
        longest = max(len(ids) for ids in tokenizer(distinct)["input_ids"])
        length = settings.text_length or min(MAX_TEXT_LENGTH, -(-longest // 8) * 8)
        return {"length": length, "vocabulary": len(tokenizer)}

    def prepare(self, captions: list[str]) -> dict[str, Tensor]:
        """Captions -> {"ids": (n, length) int64, "mask": (n, length) bool}."""
        if self.tokenizer is None:
            raise InputError(
                "this model came without a tokenizer, so it reads no prompts; convert it again with "
                "`ldm convert --tokenizer FOLDER`, or give tokens from Python"
            )
        with self._one_at_a_time:
            out = self.tokenizer(
                self._spelled(captions),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
        return {"ids": out["input_ids"], "mask": out["attention_mask"].bool()}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """A full sequence."""
        shape = (1, self.length)
        return {"ids": torch.zeros(shape, dtype=torch.int64), "mask": torch.ones(shape, dtype=torch.bool)}

    def _spelled(self, captions: Sequence[str]) -> list[str]:
        """Captions as the tokenizer takes them: bytes of a command line that are no text would be refused."""
        spelling = quote_variants(self.tokenizer) if self.joint else {}
        known = [caption[:READ_CHARACTERS].translate(spelling) for caption in captions]
        return [caption.encode("utf-8", "replace").decode() for caption in known]

    def cut(self, captions: Sequence[str]) -> list[str]:
        """Those of the captions that have more tokens than the model reads."""
        distinct = list(dict.fromkeys(captions))
        if self.tokenizer is None or not distinct:
            return []
        with self._one_at_a_time:
            ids = self.tokenizer(self._spelled(distinct), verbose=False)["input_ids"]
        longer = {
            caption for caption, own in zip(distinct, ids) if len(own) > self.length or len(caption) > READ_CHARACTERS
        }
        return [caption for caption in captions if caption in longer]

    def null(self, n: int, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The empty caption, n times."""
        return self.prepare([""] * n)

    def forward(self, inputs: dict[str, Tensor]) -> Conditioning:
        if self.joint:
            tokens = self.encoder(inputs["ids"])
        else:
            with torch.no_grad():
                if self._frozen.device != inputs["ids"].device:
                    self._frozen.to(inputs["ids"].device)
                hidden = self._frozen(input_ids=inputs["ids"], attention_mask=inputs["mask"].long()).last_hidden_state
            tokens = self.encoder(hidden.float()) * inputs["mask"][..., None]
        if self.pool is None:
            return Conditioning(context=tokens)
        return Conditioning(context=tokens, vector=self.pool(pooled(tokens)))


def _load_frozen(name: str):
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        model = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: no text encoder could be loaded from there ({str(error).splitlines()[0]})"
        ) from error
    if hasattr(model, "text_model"):
        model = model.text_model
    if hasattr(model, "decoder"):  # of T5, say: it would ask for tokens of its own
        model = model.get_encoder()
    return model.eval().requires_grad_(False)


class ClassConditioner(Conditioner):
    """Labels -> one token, and by default a vector, too. The null is one class more (index n), except where
    "null" in the spec says that there is none, as in models of others that were not trained for guidance."""

    guidance_rank = 2
    gives_tokens = True

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer=None):
        super().__init__()
        self.names: list[str] = list(spec["class_names"])
        self.has_null = spec.get("null", True)
        # code that uses a model of others names its null by the number that was published (1000 of cin256-v2)
        self.numbered_null = spec.get("null") is True
        self.embedding = nn.Embedding(len(self.names) + self.has_null, settings.context_dim)
        self.vector = nn.Linear(settings.context_dim, settings.context_dim) if settings.class_vector else None

    @staticmethod
    def gives_vector(settings: ConditionSettings) -> bool:
        """As settings say: the token through a linear map."""
        return settings.class_vector

    @staticmethod
    def learn(settings: ConditionSettings, labels: list[int], rows, folder: Path) -> dict[str, Any]:
        """Facts from the training rows: the names of the classes, in order."""
        return {"class_names": list(rows.class_names)}

    def index(self, value: str | int) -> int:
        """A class: a number is its index; a text its name, "#" and its index, or, where no class is called by a number,
        its index. Raises UsageError, naming classes."""
        if isinstance(value, str):
            found = place_of(value, self.names)
        else:
            found = int(value) if 0 <= int(value) < len(self.names) + self.numbered_null else None
        if found is None:
            raise UsageError(f"--class {value}: no such class among {len(self.names)}; {hint(value, self.names)}")
        return found

    def prepare(self, labels: list[int | str]) -> dict[str, Tensor]:
        """Labels (numbers or names) -> {"label": (n,) int64}."""
        return {"label": torch.tensor([self.index(value) for value in labels])}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """A label."""
        return {"label": torch.zeros(1, dtype=torch.int64)}

    def null(self, n: int, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The null class, n times. Raises UsageError where the model has none."""
        if not self.has_null:
            raise UsageError("this model has no class that means none, so it cannot be guided; use --guidance 1")
        return {"label": torch.full((n,), len(self.names))}

    def forward(self, inputs: dict[str, Tensor]) -> Conditioning:
        token = self.embedding(inputs["label"])
        return Conditioning(context=token[:, None], vector=self.vector(token) if self.vector is not None else None)


class PrecomputedTokens(Conditioner):
    """Tokens as they are, made by an encoder that is not part of the model: values are tensors (M, d). No null."""

    droppable = False
    gives_tokens = True

    def __init__(self, settings: ConditionSettings, spec: dict[str, Any], tokenizer=None):
        super().__init__()
        self.width = settings.context_dim

    def prepare(self, tokens: list[Tensor]) -> dict[str, Tensor]:
        """Tokens of one length -> {"tokens": (n, M, d)}."""
        return {"tokens": torch.stack(tokens)}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """As many tokens as of the longest caption: the encoder's own number is not known."""
        return {"tokens": torch.zeros(1, MAX_TEXT_LENGTH, self.width)}

    def forward(self, inputs: dict[str, Tensor]) -> Conditioning:
        return Conditioning(context=inputs["tokens"])


CONDITIONERS: dict[str, type[Conditioner]] = {
    "class": ClassConditioner,
    "text": TextConditioner,
    "layout": LayoutConditioner,
    "map": SemanticMapConditioner,
    "lowres": LowResConditioner,
    "masked": MaskedConditioner,
    "tokens": PrecomputedTokens,
}


def guidance_order(conditions: Sequence[str]) -> list[str]:
    """Those of a model's conditions that guidance can act on, in the order in which it switches them on: from where to
    what."""
    able = [condition for condition in conditions if CONDITIONERS[condition].droppable]
    return sorted(able, key=lambda condition: CONDITIONERS[condition].guidance_rank)


class Conditions(nn.Module):
    """All conditions of a model, in the order of `kinds` (`DiffusionConfig.kinds`).

    `specs` has an entry for each.
    """

    def __init__(
        self, kinds: Sequence[str], settings: ConditionSettings, specs: dict[str, dict[str, Any]], tokenizer=None
    ):
        super().__init__()
        self.settings = settings
        self.entries = nn.ModuleDict(
            {condition: CONDITIONERS[condition](settings, specs[condition], tokenizer) for condition in kinds}
        )

    @property
    def conditioners(self) -> dict[str, Conditioner]:
        """By name of the condition, in order."""
        return {name: cast(Conditioner, entry) for name, entry in self.entries.items()}

    @property
    def kinds(self) -> list[str]:
        """Names of the conditions."""
        return list(self.entries)

    @property
    def droppable(self) -> list[str]:
        """Conditions that training drops at random and that guidance can act on: all but the planes of a task."""
        return [condition for condition, entry in self.conditioners.items() if entry.droppable]

    @property
    def context_dim(self) -> int | None:
        """Width of the tokens; None where nothing gives tokens."""
        return self.settings.context_dim if any(entry.gives_tokens for entry in self.conditioners.values()) else None

    @property
    def vector_dim(self) -> int | None:
        """Width of the vector; None where nothing gives one."""
        given = any(entry.gives_vector(self.settings) for entry in self.conditioners.values())
        return self.settings.context_dim if given else None

    @property
    def concat_channels(self) -> int:
        """Planes that are stacked on z_t."""
        return sum(entry.channels for entry in self.conditioners.values())

    @property
    def encodes(self) -> bool:
        """Whether images go through the first stage."""
        return any(entry.encodes for entry in self.conditioners.values())

    def prepare(self, values: dict[str, list]) -> dict[str, Tensor]:
        """{"text": captions, "class": labels, …} -> flat dict of tensors "kind.name" with n rows each."""
        out: dict[str, Tensor] = {}
        for condition in self.entries:
            if condition not in values:
                raise ModelError(f"this model is conditioned on {' + '.join(self.kinds)}: {condition} is missing")
            out |= self.prepare_one(condition, values[condition])
        return out

    def prepare_one(self, condition: str, values: list) -> dict[str, Tensor]:
        """`prepare` for one condition."""
        return {f"{condition}.{name}": tensor for name, tensor in self.conditioners[condition].prepare(values).items()}

    def example(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """`prepare` of one row for pictures of (height, width) px, in shape alone."""
        return {
            f"{condition}.{name}": tensor
            for condition, entry in self.conditioners.items()
            for name, tensor in entry.example(size).items()
        }

    def null(self, n: int, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The null of every condition, n times, in the form of `prepare`. Planes of a task have none: those of
        `given`, which is needed then, stay. A map's null has the size of `given`'s."""
        out: dict[str, Tensor] = {}
        for condition, entry in self.conditioners.items():
            own = _own(condition, given) if given else None
            if entry.droppable:
                null = entry.null(n, own)
            elif own is None:
                raise ModelError(
                    f"{condition}: this condition has no null; pass the prepared inputs, whose planes stay"
                )
            else:
                null = own
            out |= {f"{condition}.{name}": tensor for name, tensor in null.items()}
        return out

    def complete(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs on their device with what is made of them once there (`Conditioner.complete`)."""
        return dict(inputs) | {
            f"{condition}.{name}": tensor
            for condition, entry in self.conditioners.items()
            if (own := _own(condition, inputs))
            for name, tensor in entry.complete(own).items()
        }

    def drop(self, inputs: dict[str, Tensor], dropped: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replaces rows by the null where dropped[kind] (n,) is true; kinds that `dropped` does not name stay."""
        out = dict(inputs)
        for condition, rows in dropped.items():
            own = _own(condition, inputs)
            null = self.conditioners[condition].null(len(rows), own)
            for name, tensor in own.items():
                mask = rows.reshape(-1, *[1] * (tensor.ndim - 1)).to(tensor.device)
                out[f"{condition}.{name}"] = torch.where(mask, null[name].to(tensor.device), tensor)
        return out

    def forward(
        self, inputs: Mapping[str, Tensor], size: tuple[int, int], encode: Encode | None = None
    ) -> Conditioning:
        """τ_θ(y). size: (h, w) of the latent, for conditions that are painted at it; encode: the first stage's encoder,
        pixels (B, 3, H, W) in [-1, 1] to normalised latents (B, c, h, w), for those that are latents of images."""
        joined = Conditioning()
        for condition, entry in self.conditioners.items():
            if own := _own(condition, inputs):  # research code may want tokens alone, and hand planes over itself
                more = [size] if entry.takes_size else [encode] if entry.encodes else []
                joined = joined.joined(entry(own, *more))
        return joined


def _own(condition: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.split(".", 1)[1]: tensor for name, tensor in inputs.items() if name.startswith(f"{condition}.")}
