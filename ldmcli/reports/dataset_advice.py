"""What `ldm data` advises: how many pictures there are to learn from, how long a training takes here and what few
pictures mean for it, and the commands that train on this data set."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ldmcli.core import config
from ldmcli.core.durations import rough_duration
from ldmcli.core.errors import LdmError
from ldmcli.core.settings import DataSettings, TrainSettings
from ldmcli.core.world import default_device
from ldmcli.evaluation.novelty import LEAST_HELD_OUT
from ldmcli.reports.cost_estimate import plan
from ldmcli.training.best import SMALL_SET

# how often few pictures are seen, and the least steps however few they are: a choice, since the training itself looks
# for copies and keeps the best checkpoint from before
EPOCHS, LEAST_STEPS = 100, 1_000
FIRST_STAGE_STEPS = 1_500  # after which first stages of small pictures were good (docs/train-on-my-images.md)
SLOWER = 3  # times the least time, that narrow networks take at most
HELD_OUT = 64  # pictures held out, for which a distance and copies say something
SIZES = (256, 128, 64, 32)  # px
EVALUATIONS = {"train.eval_samples": 256, "train.eval_steps": 10, "train.evaluations": 10, "train.eval_novelty": True}

# what a mirror image shows wrongly
_SIDED = re.compile(
    r"\b(left|right|clockwise|clocks?|o['’]clock|watch|letters?|numbers?|digits?|text|words?|written|writing|says|signs?"
    r"|logos?|labels?|symbols?|flags?|maps?|keyboards?|books?|newspapers?|arrows?|buttons?|musical|notes?)\b"
    r"|^\s*\w\s*$|^\s*\d+\s*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What advice follows from. different: training pictures, copies and near copies counted once; by_share: whether
    rows are held out by data.val_fraction; short_side: the median, px; kind: a condition that the data have, "" = none;
    texts: captions or names of classes; bad: whether files can't be read."""

    settings: DataSettings
    different: int
    rows: int
    held_out: int
    by_share: bool
    short_side: int
    kind: str
    texts: Sequence[str]
    bad: bool


def advise(seen: Seen) -> dict[str, Any]:
    """The advice as JSON; times are null where they can't be estimated."""
    size, flip = _size(seen), flip_is_safe(seen.texts)
    batch = max(1, min(TrainSettings().batch_size, 2 ** (seen.different.bit_length() - 1)))
    few, most = seen.different < SMALL_SET, TrainSettings().steps
    steps = min(max(_rounded(EPOCHS * seen.different // batch), LEAST_STEPS), most) if few else most
    kinds = (seen.kind,) if seen.kind else ()
    watched = few and not seen.settings.streaming
    share = _share_to_hold_out(seen) if watched else None
    watched = watched and (seen.held_out >= LEAST_HELD_OUT or share is not None)
    return {
        "different": seen.different,
        "held_out": seen.held_out,
        "few": few,
        "size": list(size),
        "condition": seen.kind or "none",
        "batch_size": batch,
        "steps": steps,
        "epochs": steps * batch / max(seen.different, 1),
        "flip": {"safe": flip, "why": _why(seen.texts)},
        "seconds": {
            "first_stage": _seconds("autoencoder", size, TrainSettings().batch_size, (), FIRST_STAGE_STEPS),
            "diffusion": _seconds("diffusion", size, batch, kinds, steps),
        },
        "commands": _commands(seen, size, batch, steps, share, watched),
        "watched": watched,
    }


def _size(seen: Seen) -> tuple[int, int]:
    """As set; else the largest that the pictures fill, 64 px at most where there is no GPU."""
    if any(seen.settings.size):
        return seen.settings.size
    most = SIZES[0] if default_device().type == "cuda" else 64
    side = next((side for side in SIZES if side <= min(most, seen.short_side)), SIZES[-1])
    return side, side


def _rounded(steps: int) -> int:
    """Down to two digits."""
    unit = 10 ** max(len(str(steps)) - 2, 0)
    return max(steps // unit * unit, 1)


def flip_is_safe(texts: Sequence[str]) -> bool:
    """Whether no caption or class names what has a side; False where there are none."""
    return bool(texts) and not any(map(_SIDED.search, texts))


def _why(texts: Sequence[str]) -> str:
    if not texts:
        return "nothing says whether pictures have a side; add --flip where a mirrored one is as good as any"
    sided = [found.group().strip() for found in map(_SIDED.search, texts) if found]
    if not sided:
        return "no caption or class names what has a side"
    return f"{len(sided):,} of {len(texts):,} captions or classes name what has a side, as “{sided[0]}”"


def _share_to_hold_out(seen: Seen) -> float | None:
    """data.val_fraction that holds out enough; None where it need not or cannot be changed."""
    if not seen.by_share or seen.held_out >= HELD_OUT or seen.rows < 4 * LEAST_HELD_OUT:
        return None
    return min(0.25, round(HELD_OUT / seen.rows + 0.005, 2))


@lru_cache(maxsize=16)
def _seconds_per_step(run_kind: str, size: tuple[int, int], batch: int, kinds: tuple[str, ...]) -> float | None:
    values: dict[str, Any] = {"data.size": size, "train.batch_size": batch}
    values |= {"condition.kinds": kinds} if run_kind == "diffusion" else {}
    try:
        found = plan(run_kind, config.resolve(run_kind, [("ldm data", values)]))["time"]
    except LdmError:  # a size that these networks do not take, which a training says in a line
        return None
    return found["seconds_per_step"] if isinstance(found, dict) else None


def _seconds(run_kind: str, size: tuple[int, int], batch: int, kinds: tuple[str, ...], steps: int) -> float | None:
    """Of a training with the default networks, at best."""
    a_step = _seconds_per_step(run_kind, size, batch, kinds)
    return None if a_step is None else a_step * steps


# ---------------------------------------------------------------- commands


def _commands(
    seen: Seen, size: tuple[int, int], batch: int, steps: int, share: float | None, watched: bool
) -> list[list[str]]:
    """Both trainings, each as a list of words."""
    same = ["--data", seen.settings.source, "--size", str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"]
    same += [word for name, value in _given(seen.settings).items() for word in ("--set", f"data.{name}={value}")]
    same += ["--val-fraction", f"{share:g}"] if share else []
    same += ["--skip-bad"] if seen.bad and not seen.settings.skip_bad else []
    same += ["--flip"] if flip_is_safe(seen.texts) and not seen.settings.flip else []
    name = re.sub(r"[^A-Za-z0-9._]+", "-", seen.settings.source.rstrip("/").rpartition("/")[2]).strip("-.") or "my"
    first, second = f"runs/{name}-ae", f"runs/{name}-model"
    train = ["--batch-size", str(batch)] if batch != TrainSettings().batch_size else []
    train += [word for key, value in EVALUATIONS.items() for word in ("--set", f"{key}={_text(value)}")] * watched
    ends = ["--condition", seen.kind or "none", "--steps", str(steps), *train, "--out", second]
    return [
        ["ldm", "train-ae", *same, "--steps", str(FIRST_STAGE_STEPS), "--out", first],
        ["ldm", "train-ldm", *same, "--autoencoder", first, *ends],
    ]


def _given(settings: DataSettings) -> dict[str, str]:
    """Settings beside source and size that are not the defaults, as text."""
    default = DataSettings()
    return {
        name: _text(value)
        for name, value in vars(settings).items()
        if name not in ("source", "size") and value != getattr(default, name)
    }


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- for people


def advice_sentences(advice: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of the advice, without the commands."""
    pictures = f"{advice['different']:,} different pictures, and {advice['held_out']:,} held out"
    epochs = f"{advice['epochs']:,.0f}" if advice["epochs"] >= 10 else f"{advice['epochs']:.2g}"
    trained = f"{advice['steps']:,} steps of {advice['batch_size']} see each picture {epochs} times"
    lines = [("learn from", pictures), ("training", f"{trained}; {_time(advice['seconds'])}")]
    if advice["few"]:
        window = (
            "so few are copied in the end. The steps until then grow with the pictures, the steps until samples are "
            "good do not (Bonnaire et al. 2025)"
        )
        if advice["epochs"] > EPOCHS:
            window += ": these may be copied first, so find more, or begin with a model of others (--init-from)"
        if advice["watched"]:
            looks = EVALUATIONS["train.evaluations"]
            window += f"; {looks} evaluations look for copies, and the best checkpoint from before stays (RUN@best)"
        lines.append(("window", window))
        if not advice["watched"]:
            lines.append(("", f"too few are held out to look for copies: at least {LEAST_HELD_OUT} are needed"))
    flip = "safe" if advice["flip"]["safe"] else "not advised"
    return [*lines, ("mirroring", f"{flip}: {advice['flip']['why']}")]


def _time(seconds: dict[str, float | None]) -> str:
    if None in seconds.values():
        return "nothing is known of the time"
    whole = sum(value for value in seconds.values() if value is not None)
    return f"with the first stage {rough_duration(whole)} to {rough_duration(SLOWER * whole)} on this machine"


def command_lines(advice: dict[str, Any], width: int) -> list[str]:
    """The commands to copy, each on lines of at most `width` characters as far as words allow."""
    lines: list[str] = []
    for words in advice["commands"]:
        lines += _folded([shlex.quote(word) for word in words], width)
    return lines


def _folded(words: list[str], width: int) -> list[str]:
    """Words as a shell reads them over several lines; an option stays beside its value."""
    parts = [words[0] + " " + words[1]]
    for word in words[2:]:
        if word.startswith("--"):
            parts.append(word)
        else:
            parts[-1] += " " + word
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) + 2 <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
