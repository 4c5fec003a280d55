"""What is kept of a reading of copies in a run's folder: novelty.json, and novelty.png with the nearest pairs."""

from pathlib import Path
from typing import Any

import numpy as np

from ldmcli.conditions.pictures import labelled
from ldmcli.core import files
from ldmcli.core.outputs import refuse_foreign, refuse_foreign_document
from ldmcli.evaluation.novelty import Novelty
from ldmcli.sampling.contact_sheets import grid, png_bytes

KIND = "ldm novelty"
SHEET, DOCUMENT = "novelty.png", "novelty.json"


def pairs_sheet(pairs: list[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    """uint8 (H, W, 3): samples above, the training picture that each is nearest to below, with their distance."""
    above = [labelled(image, f"sample {k + 1}") for k, (image, _, _) in enumerate(pairs)]
    below = [labelled(image, f"{distance:.3g}") for _, image, distance in pairs]
    return grid([above, below])


def check_place(folder: Path) -> None:
    """Raises UsageError where files that `ldm` did not write are in the way."""
    refuse_foreign([folder / SHEET])
    refuse_foreign_document(folder / DOCUMENT, KIND)


def keep_novelty(folder: Path, found: Novelty, beside: dict[str, Any]) -> None:
    """Writes both files. beside: what the document states besides, such as the step and how samples were made."""
    document = {"kind": KIND, **found.by_pixels.protocol["novelty"], **beside}
    files.write_bytes(folder / SHEET, png_bytes(pairs_sheet(found.pairs)))
    files.write_json(folder / DOCUMENT, document)
