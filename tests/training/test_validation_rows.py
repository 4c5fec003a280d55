"""Which rows a validation measures: in a folder a class follows the other, and some of its rows stand for all."""

import pytest
import tiny

from ldmcli.data.rows import Rows

CLASSES = ("cat", "dog", "owl")
UNET = [part for setting in tiny.UNET if setting.startswith("diffusion.") for part in ("--set", setting)]
NETWORK = {
    "train-ae": tiny.AE_NETWORK,
    "train-ldm": ("--autoencoder", "none", "--condition", "class", *tiny.UNET),
    "train-classifier": ("--autoencoder", "none", *UNET),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("trainer", NETWORK)
def test_a_short_run_is_validated_on_all_classes(trainer, streaming, tmp_path, monkeypatch):
    """Of 60 rows or more 16 are measured: the first 16 would be of one class."""
    for name in CLASSES:
        tiny.noisy_images(tmp_path / "data" / name, 60)
    seen, pixels = set(), Rows.pixels

    def spy(rows, i, *arguments, **options):
        if rows.split == "validation":
            seen.add(rows.class_names[rows.label(i)])
        return pixels(rows, i, *arguments, **options)

    monkeypatch.setattr(Rows, "pixels", spy)
    data = ("--data", tmp_path / "data", "--size", 16, "--val-fraction", 0.5, *["--streaming"] * streaming)
    ending = tiny.ldm(trainer, *data, *NETWORK[trainer], *tiny.QUIET_LOOP, "--steps", 2, "--out", tmp_path / "run")
    assert ending.code == 0, ending.stderr
    assert "a short run: validation on 16 of " in ending.stderr
    assert seen == set(CLASSES)
