"""What an evaluation finds: numbers under their keys, labels for people, the protocol, and warnings."""

from dataclasses import dataclass, field
from typing import Any

SCHEMA = "ldm-evaluation-1"  # what a document says it is: docs/evaluation.schema.json describes it


@dataclass
class Scores:
    """What a metric finds in whole sets of images.

    values: by name as people type it, "kid_mean"; None = there is none. estimates: what they are worth, by the same
    names, of a metric that says so itself. protocol: what a result states beside its numbers, by its keys. warnings:
    why a value is missing, and the like.
    """

    values: dict[str, float | None]
    protocol: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)


def key_of(name: str, ending: str) -> str:
    """The key of a value that holds for a network: its ending goes behind the first word, kid_effnet_lite0_mean."""
    first, _, rest = name.partition("_")
    return "_".join(filter(None, (first, ending, rest)))


@dataclass
class EvaluationResult:
    """Numbers of one evaluation, {key: value}, with a label for people for each."""

    values: dict[str, float | None] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    estimates: dict[str, dict[str, Any]] = field(default_factory=dict)  # what numbers are worth, by key
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)  # {name: n and metrics} of parts of the images
    of_each: dict[str, list[float | None]] = field(default_factory=dict)  # values image by image, by keys of means

    def take(self, other: "EvaluationResult", ending: str, label: str) -> None:
        """Adds the numbers of another one, with something behind their keys and labels."""
        for key, value in other.values.items():
            self.add(f"{key}{ending}", f"{other.labels[key]}{label}", value)
        self.estimates |= {f"{key}{ending}": one for key, one in other.estimates.items()}

    def add(self, key: str, label: str, value: float | None) -> None:
        """A number under its key."""
        self.values[key], self.labels[key] = value, label

    def add_scores(self, scores: Scores, labels: dict[str, str], network: tuple[str, str] = ("", "")) -> None:
        """The scores of a metric, whose labels are by the names of its values. network: end of keys, and name for
        people, of the network that the numbers hold for."""
        ending, title = network
        for name, value in scores.values.items():
            key = key_of(name, ending)
            self.add(key, labels[name].replace("{net}", title), value)
            if name in scores.estimates:
                self.estimates[key] = scores.estimates[name]
        self.protocol |= scores.protocol
        self.warnings += scores.warnings
