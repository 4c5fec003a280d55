"""`eval-fid --split all`: models whose conditions are made of the rows see the rows of every split."""

import json

import pytest
import tiny


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    """A folder of images with boxes in pixels."""
    folder = tmp_path_factory.mktemp("split-all") / "data"
    paths = tiny.noisy_images(folder, 24)
    rows = [
        {"file_name": path.name, "objects": {"bbox": [[2, 3, 9, 8]], "category": ["ab"[k % 2]]}}
        for k, path in enumerate(paths)
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("options", [("--task", "sr", "--scale", 2), ("--condition", "layout")], ids=["sr", "layout"])
def test_rows_of_every_split_serve_every_condition(options, boxes, tmp_path):
    data = ("--data", boxes, "--size", "20x20")
    tiny.train_ae(tmp_path / "ae", data=data, steps=1)
    tiny.train_ldm(tmp_path / "run", tmp_path / "ae", *options, data=data, steps=1)
    ending = tiny.ldm(
        *("eval-fid", "--model", tmp_path / "run", "--data", boxes, "--split", "all", "-n", 4, "--json"),
        *("--metrics", "psnr" if "sr" in options else "fid", "--features", "effnet-lite0", "--steps", 1),
    )
    assert ending.code == 0, ending.stderr
