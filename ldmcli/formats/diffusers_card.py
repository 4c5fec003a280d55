"""README.md of an exported folder: the hub's front matter, how it is loaded, what it was measured at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli.core import files, runs
from ldmcli.core.errors import LdmError
from ldmcli.formats.bundle import AutoencoderBundle, DiffusionBundle

GRID = "samples.png"


def write_card(folder: Path, bundle: AutoencoderBundle | DiffusionBundle, lines: list[str], run: Path | None) -> None:
    """Writes README.md, and the newest grid of samples of the run beside it."""
    state = _state(run)
    data = state.get("data") or {}
    conditions = bundle.config.kinds if isinstance(bundle, DiffusionBundle) else ()
    task = "text-to-image" if "text" in conditions else "unconditional-image-generation"
    if isinstance(bundle, AutoencoderBundle) or {"map", "lowres", "masked"} & set(conditions):
        task = "image-to-image"
    licence = data.get("license") if isinstance(data.get("license"), str) else None
    front = [
        "---",
        f"license: {licence or 'other'}",
        "library_name: diffusers",
        f"pipeline_tag: {task}",
        "tags:",
        "- latent-diffusion",
        *(f"- {condition}-conditional" for condition in conditions),
        "---",
    ]
    parts = ["\n".join(front), f"# {folder.name}", f"Exported for diffusers: {'; '.join(lines)}."]
    grid = _grid(run)
    if grid is not None:
        files.write_bytes(folder / GRID, grid.read_bytes())
        parts.append(f"![Samples of fixed seeds]({GRID})")
    parts += [_use(folder, conditions), _data(data, licence), _metrics(state), *_evaluations(run)]
    notes = [f"- {' '.join(note.split())}" for note in bundle.notes]
    if notes:
        parts.append("## Readings and omissions\n\n" + "\n".join(notes))
    files.write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _state(run: Path | None) -> dict[str, Any]:
    try:
        return runs.read_run(run) if run is not None else {}
    except LdmError:
        return {}


def _grid(run: Path | None) -> Path | None:
    found = sorted((run / "samples").glob("step-*.png")) if run is not None else []
    return found[-1] if found else None


def _use(folder: Path, conditions: Sequence[str]) -> str:
    named = {
        "text": 'prompt=["…"]',
        "class": "class_labels=[0]",
        "layout": "layout=LAYOUT",
        "map": "segmentation=MAP",
        "lowres": "image=IMAGE",
        "masked": "image=IMAGE, mask_image=MASK",
    }
    arguments = "".join(f"{named[condition]}, " for condition in conditions if condition in named)
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        class_name = files.read_json(folder / "config.json")["_class_name"]
        code = f"from diffusers import {class_name}\n\nmodel = {class_name}.from_pretrained(FOLDER)"
    elif (folder / "pipeline.py").is_file():
        code = (
            "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained(FOLDER, "
            f"custom_pipeline=FOLDER, trust_remote_code=True)\nimages = pipe({arguments}seed=0).images"
        )
    else:
        code = (
            "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained(FOLDER)\n"
            f"images = pipe({arguments}num_inference_steps=50).images"
        )
    return f"## Use\n\nFOLDER is this folder, or its name on the hub.\n\n```python\n{code}\n```"


def _data(data: dict[str, Any], licence: str | None) -> str:
    if not data:
        return ""
    source = " ".join(str(data.get("source", "")).rstrip("/").rpartition("/")[2].split())
    known = f"Licence of the data: {licence}." if licence else "The licence of the data is not known to the trainer."
    return f"## Data\n\n{source}, split {data.get('split')}: {data.get('rows')} rows. {known}"


def _metrics(state: dict[str, Any]) -> str:
    """The newest validation of the run."""
    metrics = state.get("metrics") or {}
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items() if isinstance(value, (int, float))]
    return "\n".join(["## Metrics", "", "| metric | value |", "|---|---|", *rows]) if rows else ""


def _evaluations(run: Path | None) -> list[str]:
    """Evaluations that lie in the run, each with its protocol as it was recorded."""
    parts = []
    for path in sorted(run.glob("eval*.json")) if run is not None else []:
        try:
            found = files.read_json(path)
        except LdmError:
            continue
        text = json.dumps(found, indent=1, ensure_ascii=False).replace("```", "'''")
        parts.append(f"### {path.stem}\n\n```json\n{text}\n```")
    return parts
