"""A sampler of one's own is one entry of SAMPLERS: `ldm sample`, previews and evaluation take it by its name."""

import numpy as np
import pytest
import tiny
import typed_lines

from ldmcli.diffusion.samplers import SAMPLERS, Sampler


# --- the code of docs/extending.md
def frozen(denoise, z, levels, *, noise=None, eta=0.0, callback=None, before_step=None):
    """A step along the probability flow with x0 and ε frozen: DDIM without noise (Song et al. 2021)."""
    for i, t in enumerate(levels.t):
        if before_step is not None:
            z = before_step(i, z)
        x0, eps = denoise(z, t, levels.alphas[i], levels.sigmas[i])
        z = levels.alphas[i + 1] * x0 + levels.sigmas[i + 1] * eps
        if callback is not None:
            callback(i, z, x0)
    return z


TOY = Sampler(frozen, order=1, stochastic=False, evaluations=lambda steps: steps, description="DDIM without noise")
# --- to here


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A text model whose previews were made by the toy sampler; features are those of small pictures."""
    folder = tmp_path_factory.mktemp("toy")
    with typed_lines.small_networks(folder), pytest.MonkeyPatch.context() as patch:
        patch.setitem(SAMPLERS, "toy", TOY)
        tiny.train_ae(folder / "ae")
        toy = ("--set", "sample.sampler=toy", "--set", "sample.steps=3", "--set", "sample.n=2")
        tiny.train_ldm(folder / "text", folder / "ae", "--condition", "text", *toy, "--sample-every", 3)
        yield folder / "text"


def test_a_sampler_that_is_added_previews_and_samples_what_its_formula_says(model, tmp_path):
    assert list((model / "samples").glob("*.png"))
    asked = ("--model", model, "--prompt", "a red circle", "-n", 3, "--steps", 5)
    for name in ("toy", "ddim"):
        ending = tiny.ldm("sample", *asked, "--sampler", name, "--out", tmp_path / name)
        assert ending.code == 0, ending.stderr
    toy, ddim = (tiny.pictures(tmp_path / name) for name in ("toy", "ddim"))
    assert len(toy) == 3
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(toy, ddim))


def test_a_sampler_that_is_added_inpaints_and_is_measured(model, tmp_path):
    (photo,) = tiny.noisy_images(tmp_path, 1)
    asked = ("--model", model, "--sampler", "toy", "--steps", 2)
    assert tiny.ldm("inpaint", photo, "--box", "4,4,8,8", *asked, "--out", tmp_path / "out").code == 0
    ending = tiny.ldm("eval-fid", *asked, "-n", 2, "--features", "effnet-lite0", "--json")
    assert ending.code == 0, ending.stderr
    assert ending.json["sampling"]["sampler"] == "toy"


def test_without_its_entry_it_is_no_sampler(tmp_path):
    ending = tiny.ldm("sample", "--prompt", "a red circle", "--sampler", "toyy", "--out", tmp_path / "out")
    assert ending.code == 2 and "dpm++" in ending.line
