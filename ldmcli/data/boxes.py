"""Which rows have boxes that a layout is worth: as many as settings want, each of a least area (App. D.3, E.3.3)."""

import numpy as np

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data.decode import BadImage, sanitise
from ldmcli.data.rows import Rows


def with_boxes(rows: Rows, settings: DataSettings) -> Rows:
    """The rows with data.min_objects … max_objects boxes, those below data.min_box_area not counted; all where these
    are 0. What is left out is noted. Raises InputError where the rows have no boxes, or none is left."""
    least, most = settings.min_objects, settings.max_objects
    if not (least or most or settings.min_box_area):
        return rows
    where = f"{sanitise(rows.source)}, {rows.split}"
    if not rows.has("objects"):
        raise InputError(
            f"{where}: data.min_objects, max_objects and min_box_area are about boxes, and there is no "
            "objects column; name it with --objects-column, or leave them out"
        )
    rows.boxes_are_shares = are_shares([rows.all_objects(i)["bbox"] for i in range(len(rows))])
    counts = np.array([_count(rows, i) for i in range(len(rows))])
    kept = np.flatnonzero((counts < 0) | ((counts >= least) & ((counts <= most) | (not most))))
    wanted = f"{least} boxes or more" if not most else f"{least} to {most} boxes"
    if settings.min_box_area:
        wanted += f" of at least {settings.min_box_area:g} of the picture"
    if not len(kept):
        raise InputError(
            f"{where}: none of {len(rows)} rows has {wanted}; change data.min_objects, max_objects or min_box_area"
        )
    chosen = rows.select(kept)
    if len(kept) < len(rows):
        chosen.notes.append(f"{len(rows) - len(kept)} of {len(rows)} {rows.split} rows, without {wanted}, left out")
    return chosen


def are_shares(boxes: list[np.ndarray]) -> bool:
    """Whether boxes (n, 4) of all pictures are shares of them: none has a number above 1."""
    found = [float(bbox.max()) for bbox in boxes if len(bbox)]
    return bool(found) and max(found) <= 1


def _count(rows: Rows, i: int) -> int:
    try:
        return len(rows.objects(i)["category"])
    except BadImage:
        return -1  # left to the check of all pictures, which names it
