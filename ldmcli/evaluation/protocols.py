"""How the paper measured: what each table's numbers were taken by, and the numbers themselves.

A protocol is a set of arguments of `evaluate`, by its table and row. Its name stands in a result only where each of
them was in force; otherwise the result says what differs, and no published number beside its own. Sources: Tab. 1 to 4,
6 to 11 and App. E.3 of Rombach et al. 2022, in the numbering of `docs/paper.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldmcli.conditions.class_ import Class
from ldmcli.conditions.layout import BoxLayout
from ldmcli.conditions.text import Text
from ldmcli.core.errors import UsageError

Number = float | tuple[float, float]  # a mean, or a mean with its deviation


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How one number, or one row of a table, was measured.

    table: where it stands, of which model. subject: "model", "autoencoder" or "task". sets: arguments of `evaluate`.
    conditions: what the model is conditioned on; task: settings of its task. rows: about how many the paper's reference
    has; 0 = as many as are measured. row_settings: which rows of the data take part, by names of `DataSettings`.
    published: numbers by the names of metrics; parts: the same by share of the masks. unpublished: parts of `sets` that
    the paper does not state, with where ours comes from.
    """

    table: str
    subject: str
    sets: Mapping[str, Any]
    published: Mapping[str, Number]
    parts: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    task: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 0
    row_settings: Mapping[str, Any] = field(default_factory=dict)
    unpublished: tuple[str, ...] = ()


FULL = ("fid", "pr")
SAMPLED = {"sampler": "ddim", "seed": 0, "weights": "ema", "features": "inception"}
TRAINING_SET = {"n": 50_000, "split": "train", "reference_count": "all", "size": (256, 256)}
USERS_ETA = "eta: 1, as a user who reproduced 3.60 (CompVis/latent-diffusion#262)"
OF_PR = "precision and recall: of 10,000 rows of the reference, as the script of guided-diffusion has them"


def _unconditional(
    row: str, rows: int, steps: int, eta: float, fid: float, precision: float, recall: float
) -> Protocol:
    sets = {**SAMPLED, **TRAINING_SET, "steps": steps, "eta": eta, "metrics": FULL}
    published = {"fid": fid, "precision": precision, "recall": recall}
    unpublished = ("eta: as in the captions of samples (App. H)", OF_PR)
    return Protocol(
        table=f"Tab. 1, {row}", subject="model", sets=sets, published=published, rows=rows, unpublished=unpublished
    )


def _imagenet(
    row: str, steps: int, guidance: float, fid: float, is_: float, precision: float, recall: float, **more: float
) -> Protocol:
    how = {"steps": steps, "eta": 1.0, "guidance": guidance, "balanced": True, "metrics": ("fid", "is", "pr"), **more}
    return Protocol(
        table=f"Tab. 3 and 10, {row}",
        subject="model",
        conditions=(Class.name,),
        sets={**SAMPLED, **TRAINING_SET, **how},
        published={"fid": fid, "is": is_, "precision": precision, "recall": recall},
        rows=1_281_167,
        unpublished=(USERS_ETA, "classes: 50 samples of each (likewise)", OF_PR),
    )


def _text(row: str, guidance: float, fid: float, is_: tuple[float, float]) -> Protocol:
    how = {"n": 30_000, "split": "validation", "reference_count": 30_000, "size": (256, 256), "steps": 250}
    return Protocol(
        table=f"Tab. 2, {row}, MS-COCO",
        subject="model",
        conditions=(Text.name,),
        sets={**SAMPLED, **how, "eta": 0.0, "guidance": guidance, "metrics": ("fid", "is")},
        published={"fid": fid, "is": is_},
        rows=30_000,
        unpublished=("eta: 0, the code's default", "captions: one of each of 30,000 images, evenly spread"),
    )


def _layout(
    row: str, steps: int, fid: float, conditions: tuple[str, ...] = (BoxLayout.name,), size: int = 256
) -> Protocol:
    how = {"n": 2048, "split": "validation", "reference_count": 2048, "size": (size, size), "steps": steps}
    return Protocol(
        table=f"Tab. 9, {row}",
        subject="model",
        conditions=conditions,
        sets={**SAMPLED, **how, "eta": 0.0, "metrics": ("fid",)},
        published={"fid": fid},
        rows=2048,
        row_settings={"min_objects": 2, "max_objects": 30},
        unpublished=("eta: 0, the code's default", "reference: the rows whose layouts are drawn"),
    )


INPAINTED = {**SAMPLED, "steps": 50, "sampler": "ddim", "eta": 0.0, "blend": 0, "whole": True}
OF_MASKS = "masks: of LaMa's published configuration (thick), drawn anew"


def _efficiency(row: str, fid: float) -> Protocol:
    how = {"n": 2000, "split": "validation", "size": (256, 256), "masks": "lama-thick", "metrics": ("fid",)}
    unpublished = ("steps and eta: as the script of the published model", OF_MASKS)
    return Protocol(
        task={"name": "inpaint"},
        table=f"Tab. 6, {row}, FID@2k after epoch 6",
        subject="task",
        sets={**INPAINTED, **how},
        published={"fid": fid},
        unpublished=unpublished,
    )


def _places(row: str, fid: float, lpips: tuple[float, float], hard: tuple[float, tuple[float, float]]) -> Protocol:
    how = {"n": 30_000, "split": "test", "size": (512, 512), "masks": "lama-thick", "perceptual": "vgg"}
    return Protocol(
        task={"name": "inpaint"},
        table=f"Tab. 7, {row}, Places",
        subject="task",
        sets={**INPAINTED, **how, "metrics": ("fid", "lpips")},
        published={"fid": fid, "lpips": lpips},
        parts={"40-50 %": {"fid": hard[0], "lpips": hard[1]}},
        unpublished=("steps and eta: as the script of the published model", OF_MASKS),
    )


def _enlarged(
    row: str, steps: int, fids: tuple[float, float], is_: float, psnr: float, ssim: float, **more: Any
) -> Protocol:
    how = {"n": "all", "split": "validation", "also_split": "train", "reference_count": "all", "size": (256, 256)}
    measured = {"metrics": ("fid", "is", "psnr", "ssim"), "steps": steps, "eta": 1.0}
    return Protocol(
        table=f"Tab. 4 and 11, {row}, ImageNet validation 64 to 256",
        subject="task",
        task={"name": "sr", "scale": 4, "degradation": "bicubic"},
        sets={**SAMPLED, **how, **measured, **more},
        published={"fid": fids[0], "fid_train": fids[1], "is": is_, "psnr": psnr, "ssim": ssim},
        rows=50_000,
        row_settings={"min_side": 256},
        unpublished=(
            "eta: 1, as the notebook of the published model",
            "SSIM: Wang's, of the original repository",
            *(("guide: rule and scale, which are our defaults",) if "guide_factor" in more else ()),
        ),
    )


# R-FID, R-IS, PSNR, SSIM of Tab. 8. Its PSIM is left out: how that was computed is unknown.
_FIRST_STAGES: dict[str, tuple[float, float, tuple[float, float], tuple[float, float]]] = {
    "vq-f32": (31.83, 40.40, (17.45, 2.90), (0.41, 0.18)),
    "vq-f16": (5.15, 144.55, (20.83, 3.61), (0.54, 0.18)),
    "vq-f8": (1.14, 201.92, (23.07, 3.99), (0.65, 0.16)),
    "vq-f8-n256": (1.49, 194.20, (22.35, 3.81), (0.62, 0.16)),
    "vq-f4": (0.58, 224.78, (27.43, 4.26), (0.82, 0.10)),
    "vq-f4-noattn": (1.06, 221.94, (25.21, 4.17), (0.76, 0.12)),
    "vq-f4-n256": (0.47, 223.81, (26.43, 4.22), (0.80, 0.11)),
    "vq-f2": (0.16, 232.75, (30.85, 4.12), (0.91, 0.05)),
    "vq-f2-n64": (0.40, 226.62, (29.13, 3.46), (0.90, 0.05)),
    "kl-f32": (2.04, 189.53, (22.27, 3.93), (0.61, 0.17)),
    "kl-f32-c16": (7.3, 132.75, (20.38, 3.56), (0.53, 0.18)),
    "kl-f16": (0.87, 210.31, (24.08, 4.22), (0.68, 0.15)),
    "kl-f16-c8": (2.63, 178.68, (21.94, 3.92), (0.59, 0.17)),
    "kl-f8": (0.90, 209.90, (24.19, 4.19), (0.69, 0.15)),
    "kl-f4": (0.27, 227.57, (27.53, 4.54), (0.82, 0.11)),
    "kl-f2": (0.086, 232.66, (32.47, 4.19), (0.93, 0.04)),
}


def _first_stage(name: str) -> Protocol:
    fid, is_, psnr, ssim = _FIRST_STAGES[name]
    how = {"features": "inception", "n": 50_000, "split": "validation", "size": (256, 256)}
    return Protocol(
        table=f"Tab. 8, {name}, ImageNet validation",
        subject="autoencoder",
        sets={**how, "metrics": ("fid", "is", "psnr", "ssim")},
        published={"fid": fid, "is": is_, "psnr": psnr, "ssim": ssim},
        unpublished=("size and crop: the short side to 256, the middle", "SSIM: Wang's, of the original repository"),
    )


PROTOCOLS: dict[str, Protocol] = {
    "tab1-celebahq": _unconditional("CelebA-HQ 256, LDM-4", 25_000, 500, 0.0, 5.11, 0.72, 0.49),
    "tab1-ffhq": _unconditional("FFHQ 256, LDM-4", 60_000, 200, 1.0, 4.98, 0.73, 0.50),
    "tab1-lsun-churches": _unconditional("LSUN churches 256, LDM-8", 121_227, 200, 0.0, 4.02, 0.64, 0.52),
    "tab1-lsun-beds": _unconditional("LSUN bedrooms 256, LDM-4", 2_993_042, 200, 1.0, 2.95, 0.66, 0.48),
    "tab2-coco": _text("LDM-KL-8", 1.0, 23.31, (20.03, 0.33)),
    "tab2-coco-g": _text("LDM-KL-8-G", 1.5, 12.63, (30.29, 0.42)),
    "tab3-imagenet": _imagenet("LDM-4", 250, 1.0, 10.56, 103.49, 0.71, 0.62),
    "tab3-imagenet-g": _imagenet("LDM-4-G, scale 1.5", 250, 1.5, 3.60, 247.67, 0.87, 0.48),
    "tab10-imagenet-g1.25": _imagenet("LDM-4-G, scale 1.25", 250, 1.25, 3.95, 178.22, 0.81, 0.55),
    "tab10-imagenet-ldm8": _imagenet("LDM-8, 2.9M steps", 200, 1.0, 17.41, 72.92, 0.65, 0.62),
    "tab10-imagenet-ldm8-4.8m": _imagenet("LDM-8, 4.8M steps", 200, 1.0, 15.51, 79.03, 0.65, 0.63),
    "tab10-imagenet-ldm8-g": _imagenet(
        "LDM-8-G, 2.9M steps", 200, 1.0, 8.11, 190.43, 0.83, 0.36, classifier_scale=10.0
    ),
    "tab10-imagenet-ldm8-g-4.8m": _imagenet(
        "LDM-8-G, 4.8M steps", 200, 1.0, 7.76, 209.52, 0.84, 0.35, classifier_scale=10.0
    ),
    "tab4-sr": _enlarged("LDM-4", 100, (2.8, 4.8), 166.3, 24.4, 0.69, tone=0.0),
    "tab4-sr-15ep": _enlarged("LDM-4, 15 more epochs", 100, (2.6, 4.6), 169.76, 24.4, 0.69, tone=0.0),
    "tab11-sr-pixels": _enlarged("pixel-based DM", 100, (5.1, 7.1), 163.06, 24.1, 0.59, tone=0.0),
    "tab11-sr-guided": _enlarged("LDM-4, guided", 50, (4.4, 6.4), 153.7, 25.8, 0.74, guide_factor=4, tone=0.0),
    "tab6-pixels": _efficiency("LDM-1, no first stage", 24.74),
    "tab6-kl-attn": _efficiency("LDM-4, KL, with attention", 15.21),
    "tab6-vq-attn": _efficiency("LDM-4, VQ, with attention", 14.99),
    "tab6-vq-noattn": _efficiency("LDM-4, VQ, without attention", 15.95),
    "tab7-places-big-ft": _places("LDM-4, big, fine-tuned", 1.50, (0.137, 0.080), (9.39, (0.246, 0.042))),
    "tab7-places-big": _places("LDM-4, big", 2.40, (0.142, 0.085), (12.89, (0.257, 0.047))),
    "tab7-places": _places("LDM-4", 2.15, (0.144, 0.084), (11.87, (0.257, 0.042))),
    "tab7-places-noattn": _places("LDM-4, without attention", 2.37, (0.145, 0.084), (12.60, (0.259, 0.041))),
    **{f"tab8-{name}": _first_stage(name) for name in _FIRST_STAGES},
    "tab9-coco-ldm8": _layout("COCO, LDM-8", 100, 42.06),
    "tab9-coco-ldm4": _layout("COCO, LDM-4 fine-tuned from OpenImages", 200, 40.91),
    "tab9-openimages": _layout("OpenImages 256, LDM-4", 200, 32.02),
    "tab9-openimages512": _layout("OpenImages 512, LDM-4", 200, 35.80, size=512),
}


def protocol_of(name: str) -> Protocol:
    """The protocol of this name. Raises UsageError for one that there is not."""
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name}: there is none of this name; --protocol list shows all {len(PROTOCOLS)}")
    return PROTOCOLS[name]


def applied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `evaluate` with what their protocol sets. What is given wins, and is listed under "differs" where it
    is not what the protocol has."""
    if not arguments.get("protocol"):
        return dict(arguments)
    protocol = protocol_of(arguments["protocol"])
    given = {name: value for name, value in arguments.items() if value is not None}
    differs = [
        f"{name}: {_shown(wanted)} there, {_shown(given[name])} here"
        for name, wanted in protocol.sets.items()
        if name in given and _plain(given[name]) != _plain(wanted)
    ]
    return {**arguments, **protocol.sets, **given, "row_settings": protocol.row_settings, "differs": tuple(differs)}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value) else value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def check_protocol(name: str, subject: str, conditions: tuple[str, ...], task: Mapping[str, Any]) -> None:
    """Raises UsageError where a protocol is of another kind of run, or of models conditioned on something else."""
    protocol = protocol_of(name)
    if subject != protocol.subject:
        kinds = {"model": "a model's samples", "autoencoder": "an autoencoder", "task": "a model with a task"}
        raise UsageError(f"--protocol {name}: measures {kinds[protocol.subject]}, which is not what was given")
    for key, value in protocol.task.items():
        if task.get(key) != value:
            raise UsageError(f"--protocol {name}: is of models with task.{key} = {value}; this one has {task.get(key)}")
    if set(conditions) != set(protocol.conditions):
        wanted, there = (" and ".join(names) or "nothing" for names in (protocol.conditions, conditions))
        raise UsageError(f"--protocol {name}: is of models conditioned on {wanted}; this one is on {there}")


def differences(
    name: str, differs: tuple[str, ...], *, n: int, rows: int | None, features: str | None, conditioned: bool
) -> list[str]:
    """Why the numbers of an evaluation may not carry a protocol's name; [] where they may.

    differs: what `applied` found. n: images that are measured; rows: of the reference, None where nobody knows;
    features: the extractor, None for one whose weights are not the published ones.
    """
    protocol, found = protocol_of(name), list(differs)
    wanted = protocol.sets.get("features")
    if wanted and features != wanted and not any(text.startswith("features") for text in found):
        found.append(f"features: {wanted} there, {features or 'unknown weights'} here")
    if rows is None and protocol.rows:
        found.append("reference: of an unknown number of rows")
    elif rows is not None and rows < 0.9 * protocol.rows:
        found.append(f"reference: about {protocol.rows:,} rows there, {rows:,} here")
    if rows is not None and conditioned and rows < n and Class.name not in protocol.conditions:
        found.append(f"rows: {rows:,} for {n:,} samples, so conditions repeat")
    return found


def statement(name: str, reasons: list[str]) -> dict[str, Any]:
    """What a result says of its protocol. name: None where something differs, with what under `differs`."""
    protocol = protocol_of(name)
    stated = {
        "name": None if reasons else name,
        "asked": name,
        "differs": reasons,
        "table": protocol.table,
        "published": _as_json(protocol.published),
        "unpublished": list(protocol.unpublished),
    }
    parts = {part: _as_json(numbers) for part, numbers in protocol.parts.items()}
    return {**stated, **({"published_by_masked_share": parts} if parts else {})}


def _as_json(numbers: Mapping[str, Number]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in numbers.items()}
