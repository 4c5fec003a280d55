"""The rows of a training: opened, checked, and the same on all processes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ldmcli.core import console
from ldmcli.data.decode import BadImage
from ldmcli.data.rows import Room
from ldmcli.data.shards import first_rows, open_shards
from ldmcli.data.sources import decode_all, divided, drop_unreadable, held_out, is_shapes, whole_rows
from ldmcli.data.streaming import StreamedRows, rows_in_an_epoch
from ldmcli.training.distributed import Distributed

STREAMED_VALIDATION = 512  # rows of validation that a stream gives


def open_data(
    config,
    dist: Distributed,
    size: tuple[int, int],
    *,
    look: Callable[[Any], Any] = lambda rows: None,
    fill_cache: Callable[[Any], list[BadImage] | None] = lambda rows: None,
):
    """(training rows, validation rows, errors of files left out), the same on all processes. Collective.

    Each image is hashed and decoded by one process; what is kept of images fits in each one's part of the memory
    (`Room`). look: called with both kinds of rows before anything is decoded, may raise. fill_cache: takes what it
    wants of training rows while each is decoded, and gives the errors of those that can't be; None where it takes
    nothing. Raises InputError and UsageError.
    """
    settings = replace(config.data, size=size)
    if settings.streaming:
        return _stream(config, settings, dist, look)
    whole, undivided = dist.on_all_ranks(lambda: whole_rows(settings, "train"))
    other, held = whole, None
    if undivided:
        share_hashes(whole, dist)
        held, readable = dist.on_rank_0(lambda: (held_out(whole, settings), whole.readable))
        whole.readable |= readable
    else:
        other, _ = dist.on_all_ranks(lambda: whole_rows(settings, "validation"))
    whole.room = other.room = Room()
    rows = divided(whole, settings, "train", held)
    validation = divided(other, settings, "validation", held)
    dist.on_all_ranks(lambda: [look(part) for part in (rows, validation)])
    rows, bad = _without_unreadable(rows, settings, dist, fill_cache(rows))
    validation, worse = _without_unreadable(validation, _uncropped(settings), dist)
    _log_notes(rows, validation)
    return rows, validation, [*bad, *worse]


def _stream(config, settings, dist: Distributed, look):
    """`open_data` of a stream: the parts are counted by one process, and each reads what it takes of them."""
    shards, both = dist.on_all_ranks(lambda: open_shards(settings, "train"))
    index = dist.on_rank_0(shards.index)
    seed, batch = config.train.seed, config.train.batch_size
    rows = dist.on_all_ranks(lambda: StreamedRows(shards, index, settings, seed=seed, batch=batch, divided=both))
    if not both:
        shards, _ = dist.on_all_ranks(lambda: open_shards(settings, "validation"))
        index = replace(dist.on_rank_0(shards.index), class_names=rows.class_names)
    validation = dist.on_all_ranks(lambda: first_rows(shards, index, both, "validation", STREAMED_VALIDATION))
    dist.on_all_ranks(lambda: [look(part) for part in (rows, validation)])
    validation, bad = _without_unreadable(validation, _uncropped(settings), dist)
    _log_notes(rows, validation)
    return rows, validation, bad


def _uncropped(settings):
    """How validation rows are seen."""
    return replace(settings, crop="center", crop_min=1.0, crop_max=1.0, cache_views=0)


def _log_notes(rows, validation) -> None:
    for note in dict.fromkeys([*rows.notes, *validation.notes]):
        console.say(f"data: {note}")


def share_hashes(rows, dist: Distributed) -> None:
    """Every process hashes its share of the images and gets the hashes of the others. Collective."""
    if is_shapes(rows.source):
        return  # nothing is stored that would have to be read
    shares = [range(rank, len(rows), dist.world_size) for rank in range(dist.world_size)]
    for indices, hashes in zip(shares, dist.gather(rows.hashes_of(shares[dist.rank]))):
        rows.learn_hashes(indices, hashes)


def _without_unreadable(rows, settings, dist: Distributed, bad: list[BadImage] | None = None):
    """`drop_unreadable` rows and the bad ones, each of which one process decoded. bad: where they are known."""
    if bad is None:
        mine = rows.unread(range(dist.rank, len(rows), dist.world_size))
        found = dist.gather(decode_all(rows, settings, indices=mine, workers=settings.workers))
        bad = sorted(sum(found, []), key=lambda error: error.index)
    rows.transparent_rows.update(*dist.gather(rows.transparent_rows))
    share_hashes(rows, dist)
    return dist.on_all_ranks(lambda: drop_unreadable(rows, settings, bad=bad))


def data_summary(rows, validation, bad, captions: tuple[str, ...] = ()) -> dict[str, Any]:
    """The entry "data" of run.json. captions: templates that training captions are drawn from."""
    return {
        **({"captions": list(captions)} if captions else {}),
        "source": rows.source,
        "split": rows.split,
        "rows": rows_in_an_epoch(rows),
        "validation_rows": len(validation),
        "fingerprint": rows.fingerprint,
        "columns": rows.columns,
        "left_out": [str(item) for item in bad][:100],
    }
