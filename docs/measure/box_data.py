"""The pictures that the model in the box may learn from: emoji of the vendors whose licences allow to ship what was
learned from them under ours.

    python docs/measure/box_data.py emoji64 --out emoji-box

Reads the Parquet files of a data set with a column `style`, as emoji64 has, and writes the rows of the styles in
`SOURCES`, in their order and with all columns; pictures are not encoded again. Others stay out: openmoji's licence
(CC-BY-SA-4.0) asks that what builds on it carries the same licence.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

STYLE = "style"


@dataclass(frozen=True)
class Source:
    """Drawings of one vendor."""

    title: str
    by: str
    licence: str
    where: str


SOURCES = {
    "twemoji": Source(
        "Twemoji graphics",
        "Copyright Twitter, Inc and other contributors, and the contributors to jdecked/twemoji",
        "CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/",
        "https://github.com/jdecked/twemoji",
    ),
    "noto": Source(
        "Noto Emoji images",
        "Copyright Google LLC and the contributors to googlefonts/noto-emoji",
        "Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "fluent-flat": Source(
        "Fluent Emoji, flat",
        "Copyright (c) Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    "fluent": Source(
        "Fluent Emoji, three-dimensional",
        "Copyright (c) Microsoft Corporation",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
    ),
}


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a data set. Raises SystemExit where there are none."""
    found = sorted(folder.rglob("*.parquet")) if folder.is_dir() else [folder] if folder.suffix == ".parquet" else []
    if not found:
        sys.exit(f"{folder}: no Parquet files with a column {STYLE!r}, as emoji64 has them")
    return found


def styles_of(table: pa.Table, path: Path) -> list[str]:
    """The style of each row, by name. Raises SystemExit where the table has none."""
    if STYLE not in table.column_names:
        sys.exit(f"{path}: no column {STYLE!r}, so nobody knows the licence of a row; there are {table.column_names}")
    values = table.column(STYLE).to_pylist()
    described = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = described.get("info", {}).get("features", {}).get(STYLE, {}).get("names")
    return [names[value] if names and isinstance(value, int) else str(value) for value in values]


def filtered(table: pa.Table, path: Path) -> tuple[pa.Table, Counter, Counter]:
    """(the rows whose style is in `SOURCES`, their number by style, that of the others)."""
    styles = styles_of(table, path)
    kept = [style in SOURCES for style in styles]
    taken = Counter(style for style, keep in zip(styles, kept) if keep)
    return table.filter(pa.array(kept)), taken, Counter(styles) - taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows that may be learned from")
    given = parser.parse_args()
    if given.out.exists() and any(given.out.iterdir()):
        sys.exit(f"{given.out}: holds files already; choose another --out")
    for path in parquet_files(given.data):
        table, taken, left = filtered(pq.read_table(path), path)
        given.out.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, given.out / path.name)
        counts = ", ".join(f"{style} {count:,}" for style, count in taken.items())
        print(f"{given.out / path.name}: {table.num_rows:,} rows ({counts}); left out: {dict(left) or 'none'}")


if __name__ == "__main__":
    main()
