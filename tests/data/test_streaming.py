"""A stream gives each row in its turn, whoever reads it: without state, and without reading a row for nothing."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ldmcli.core.errors import InputError
from ldmcli.core.settings import DataSettings
from ldmcli.data import readers, rows, shards, streaming
from ldmcli.data.batches import rank_slice
from ldmcli.data.shards import HubShards, ParquetShards, first_rows, open_shards
from ldmcli.data.sources import open_rows
from ldmcli.data.streaming import StreamedRows, rows_in_an_epoch, spread, windows_of

SIZE = (4, 4)
GROUPS, PER_GROUP = 4, 10  # of a Parquet file


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, value // 256, 7)).save(file, "PNG")
    return file.getvalue()


def parquet(path: Path, values, group: int = PER_GROUP) -> None:
    import datasets

    data = {"image": [{"bytes": png(k), "path": None} for k in values], "text": [f"t{k}" for k in values]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(data, features).to_parquet(path, batch_size=group)


def tar(path: Path, values) -> None:
    with tarfile.open(path, "w") as archive:
        for k in values:
            for name, content in (
                (f"{k:04}.png", png(k)),
                (f"{k:04}.cls", b"%d" % (k % 3)),
                (f"{k:04}.txt", b"t%d" % k),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """240 pictures in 6 Parquet files of 4 groups, in 6 archives, and loose; 20 more for validation of Parquet."""
    root = tmp_path_factory.mktemp("streams")
    for folder in ("parquet", "held-out", "tar", "loose"):
        (root / folder).mkdir()
    for k in range(6):
        values = range(40 * k, 40 * k + 40)
        parquet(root / "parquet" / f"train-{k}.parquet", values)
        parquet(root / "held-out" / f"{k}.parquet", values)
        tar(root / "tar" / f"{k}.tar", values)
    parquet(root / "parquet" / "validation.parquet", range(1000, 1020))
    for k in range(240):
        (root / "loose" / f"{k:04}.png").write_bytes(png(k))
    return root


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 40)


def settings(source, **more) -> DataSettings:
    return DataSettings(source=str(source), size=SIZE, streaming=True, **more)


def opened(chosen: DataSettings, *, seed: int = 0, batch: int = 6) -> StreamedRows:
    found, divided = open_shards(chosen, "train")
    return StreamedRows(found, found.index(), chosen, seed=seed, batch=batch, divided=divided)


def values(stream, positions) -> list[int]:
    """What was drawn into the pictures at those positions."""
    seen = (stream.pixels(p, SIZE)[0, 0].astype(int) for p in positions)
    return [int(red + 256 * green) for red, green, _ in seen]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the pictures that were decoded."""
    names: list[str] = []
    decode = rows.decode
    monkeypatch.setattr(rows, "decode", lambda content, **more: names.append(more["name"]) or decode(content, **more))
    return names


@pytest.fixture
def read(monkeypatch) -> list[tuple[int, int]]:
    """(file, place) of the parts that were read."""
    found: list[tuple[int, int]] = []
    for kind in (ParquetShards, shards.ArchiveShards):

        def noted(self, index, part, table=kind.table):
            found.append((index.files[part], index.places[part]))
            return table(self, index, part)

        monkeypatch.setattr(kind, "table", noted)
    return found


@pytest.mark.parametrize("batch", [1, 3, 6, 50, 1000])
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 40, 41])
def test_each_row_of_a_window_has_one_place(rows, batch):
    assert sorted(spread(place, rows, batch) for place in range(rows)) == list(range(rows))


def test_a_batch_has_rows_of_all_parts_of_its_window_and_a_process_of_few():
    first = [spread(place, 400, 40) for place in range(40)]
    assert {row // 100 for row in first} == {0, 1, 2, 3}
    assert {spread(step * 40 + slot, 400, 40) // 100 for step in range(10) for slot in range(10)} == {0}


def test_windows_are_files_where_files_are_large_enough(data):
    index = opened(settings(data / "parquet"))._index
    for epoch in range(3):
        found = windows_of(index, 0, epoch)
        assert all(len({index.files[part] for part in window}) == 1 for window in found.parts)
        assert sorted(sum(found.parts, [])) == list(range(24)) and found.starts[-1] == 240
    assert windows_of(index, 0, 0).parts != windows_of(index, 0, 1).parts != windows_of(index, 1, 1).parts


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
@pytest.mark.parametrize("kind", ["parquet", "shapes"])
def test_an_epoch_has_every_row_once_in_a_new_order(data, kind, batch):
    chosen = settings("shapes", limit=30) if kind == "shapes" else settings(data / kind)
    stream = opened(chosen, batch=batch)
    n = 30 if kind == "shapes" else 240
    found = [[rows.name(i) for rows, i in map(stream.at, range(e * n, e * n + n))] for e in range(2)]
    assert len(set(found[0])) == len(set(found[1])) == n and set(found[0]) == set(found[1])
    assert found[0] != found[1] != sorted(found[1])
    assert rows_in_an_epoch(stream) == n  # what a run, its log and its card say of the data


@pytest.mark.parametrize("kind", ["held-out", "tar", "loose"])
def test_rows_of_validation_are_those_of_open_rows_and_never_trained_on(data, kind):
    """Where no split exists, they are told by their hash; others of their window stand in their places."""
    chosen = settings(data / kind, val_fraction=0.2)
    train, held_out = (open_rows(replace(chosen, streaming=False), split=split) for split in ("train", "validation"))
    stream = opened(chosen)
    seen = values(stream, range(240))
    assert set(seen) == set(values(train, range(len(train)))) and max(map(seen.count, seen)) <= 6
    assert rows_in_an_epoch(stream) == 240 * 0.8 == pytest.approx(rows_in_an_epoch(train), rel=0.1)
    found = first_rows(*with_index(chosen), "validation", 512)
    assert values(found, range(len(found))) == values(held_out, range(len(held_out)))
    assert len(first_rows(*with_index(chosen), "validation", 5)) == 5


def with_index(chosen):
    found, divided = open_shards(chosen, "validation")
    return found, found.index(), divided


def test_a_validation_split_is_taken_whole_and_in_order(data):
    found = first_rows(*with_index(settings(data / "parquet")), "validation", 512)
    assert values(found, range(20)) == list(range(1000, 1020)) and len(found) == 20
    assert [found.caption(i) for i in range(20)] == [f"t{k}" for k in range(1000, 1020)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_read_what_one_does_each_row_decoded_once(data, world, decoded):
    """Disjoint, complete, and decoded by who takes it; the batches do not depend on the number of processes."""
    chosen, batch = settings(data / "parquet"), 16
    whole = values(opened(chosen, batch=batch), range(240))
    del decoded[:]
    ranks = [opened(chosen, batch=batch) for _ in range(world)]
    seen: list[int] = []
    for step in range(15):
        for rank, stream in enumerate(ranks):
            mine = rank_slice(batch, rank, world)
            seen += values(stream, range(step * batch + mine.start, step * batch + mine.stop))
    assert seen == whole and len(decoded) == len(set(decoded)) == 240


def test_a_process_among_several_reads_few_parts_of_a_window(data, read):
    """Four processes and windows of four groups: not each reads all."""
    for rank in range(4):
        stream, mine = opened(settings(data / "parquet"), batch=16), rank_slice(16, rank, 4)
        for step in range(15):
            values(stream, range(step * 16 + mine.start, step * 16 + mine.stop))
    assert len(read) <= 2 * 24  # 24 groups, of which some are read by two


@pytest.mark.parametrize("kind", ["parquet", "held-out", "tar"])
def test_going_on_at_step_1000_reads_two_shards_at_most(data, kind, read, decoded):
    at = range(11_000, 11_011)  # the last sixth of an epoch
    whole = values(opened(settings(data / kind), batch=11), at)
    del read[:], decoded[:]
    stream = opened(settings(data / kind), batch=11)
    assert not read and not decoded
    assert values(stream, at) == whole
    assert len({file for file, _ in read}) <= 2 and len(read) <= 2 * GROUPS
    assert len(decoded) == 11


def test_a_part_is_read_once_however_many_threads_ask(data, read):
    from concurrent.futures import ThreadPoolExecutor

    stream = opened(settings(data / "tar"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stream.name, range(40)))
    assert len(read) == len(set(read)) <= 2


def test_captions_labels_and_names_belong_to_the_picture(data):
    stream = opened(settings(data / "tar"))
    assert stream.has("label") and stream.has("caption") and not stream.has("objects")
    for position, value in enumerate(values(stream, range(60))):
        assert stream.caption(position) == f"t{value}"
        assert stream.class_names[stream.label(position)] == str(value % 3)
        assert stream.name(position).endswith(f"{value:04}")


@pytest.mark.parametrize("world", [1, 3])
def test_bad_pictures_are_replaced_alike_on_all_processes(tmp_path, world):
    for k in range(40):
        (tmp_path / f"{k:02}.png").write_bytes(png(k)[: 20 if k % 4 == 0 else None])
    chosen = settings(tmp_path, val_fraction=0.01)
    with pytest.raises(InputError, match="--skip-bad"):
        values(opened(chosen), range(40))
    chosen = replace(chosen, skip_bad=True)
    whole = values(opened(chosen, batch=8), range(40))
    ranks = [opened(chosen, batch=8) for _ in range(world)]
    seen = []
    for step in range(5):
        for rank, stream in enumerate(ranks):
            mine = rank_slice(8, rank, world)
            at = range(step * 8 + mine.start, step * 8 + mine.stop)
            seen += values(stream, at)
            assert [stream.name(p) for p in at] == [f"{v:02}.png" for v in seen[-len(at) :]]
    assert seen == whole and not any(value % 4 == 0 for value in seen)


def test_the_limit_takes_the_first_rows(data):
    stream = opened(settings(data / "parquet", limit=25))
    assert sorted(values(stream, range(25))) == list(range(25))


def test_headers_of_archives_are_read_once(data, tmp_path, monkeypatch):
    chosen = settings(data / "tar", cache_dir=str(tmp_path))
    first = with_index(chosen)[1]
    monkeypatch.setattr(shards, "read_archives", None)
    assert with_index(chosen)[1] == first and first.lengths == [40] * 6
    (kept,) = tmp_path.rglob("indices/*.json")
    kept.write_text("{")
    with pytest.raises(TypeError):  # counted anew
        with_index(chosen)


def test_the_fingerprint_changes_with_files_and_needs_no_row(data, read):
    found = {kind: opened(settings(data / kind)).fingerprint for kind in ("parquet", "tar", "loose")}
    assert len(set(found.values())) == 3 and not read
    assert opened(settings(data / "parquet"), seed=3).fingerprint == found["parquet"]


def test_parquet_files_of_the_hub_are_read_by_row_group(data, monkeypatch):
    import datasets

    local = {"train": sorted(map(str, (data / "parquet").glob("train*")))}
    builder = datasets.load_dataset_builder("parquet", data_files=local)
    monkeypatch.setattr(readers, "_mind_the_network", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a: builder)
    stream = opened(settings("owner/name", val_fraction=0.2))
    assert isinstance(open_shards(settings("owner/name"), "train")[0], ParquetShards)
    assert len(set(values(stream, range(240)))) > 180 and stream.caption(3).startswith("t")


def test_other_data_of_the_hub_are_read_shard_by_shard(data, monkeypatch):
    import datasets

    local = {"train": sorted(map(str, (data / "parquet").glob("train*")))}
    loaded = datasets.load_dataset("parquet", data_files=local, streaming=True)
    monkeypatch.setattr(shards, "hub_files", lambda settings: {})
    monkeypatch.setattr(shards, "load_hub", lambda settings, streaming: loaded)
    monkeypatch.setattr(shards, "UNKNOWN_ROWS", 45)  # shards have 40
    found, divided = open_shards(settings("owner/name"), "train")
    assert isinstance(found, HubShards) and divided and found.index().lengths == [45] * 6
    stream = opened(settings("owner/name", val_fraction=0.001))
    seen = values(stream, range(6 * 45))
    assert len(set(seen)) >= 239 and max(map(seen.count, seen)) <= 3  # one may be held out


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="a.parquet: cannot be read as parquet"):
        opened(settings(tmp_path))


def test_a_set_without_rows_to_train_on_is_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    with pytest.raises(InputError, match="no train rows"):
        values(opened(settings(tmp_path, val_fraction=0.9999)), range(1))
