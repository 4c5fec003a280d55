"""Networks of diffusers folders that came without a first stage, or without the encoder of their tokens: what makes
pictures of them says what is missing, by every command."""

import pytest
from golden_cases import shared
from PIL import Image
from tiny import ldm

import ldmcli
from ldmcli.core.errors import ModelError

NO_STAGE = "denoises 4 channels and came without the first stage"
NO_ENCODER = "reads tokens of an encoder that it does not carry"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """{"latents": an unconditional network of latents, "tokens": one that reads tokens of pixels}"""
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for name, source in (("latents", "unet2d_film"), ("tokens", "unet2d_condition")):
        found[name] = folder / name
        assert ldm("convert", shared("diffusers", source), found[name]).code == 0
    return found


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (16, 16), "teal").save(path)
    return path


COMMANDS = {
    "sample": lambda run, photo: ("sample", "--model", run, "-n", 1, "--steps", 2),
    "sample from a picture": lambda run, photo: ("sample", "--model", run, "--steps", 2, "--init-image", photo),
    "inpaint": lambda run, photo: ("inpaint", photo, "--model", run, "--box", "1,1,3,3", "--steps", 2),
    "reconstruct": lambda run, photo: ("reconstruct", photo, "--autoencoder", run),
    "eval-fid": lambda run, photo: ("eval-fid", "--model", run, "--data", "shapes", "--limit", 8, "-n", 2),
    "bench": lambda run, photo: ("bench", "--model", run),
    "train-classifier": lambda run, photo: (
        *("train-classifier", "--model", run, "--data", "shapes", "--limit", 8, "--steps", 1),
    ),
    "distill": lambda run, photo: ("distill", run, "--data", "shapes", "--limit", 8, "--steps", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_network_of_latents_makes_no_pictures_without_its_first_stage(networks, tmp_path, command, photo):
    more = () if command in ("eval-fid", "bench") else ("--out", tmp_path / "out")
    ending = ldm(*COMMANDS[command](networks["latents"], photo), *more)
    assert ending.code == 4 and NO_STAGE in ending.line, ending.stderr


@pytest.mark.parametrize("command", ["sample", "inpaint", "eval-fid"])
def test_a_network_that_reads_tokens_says_where_they_come_from(networks, tmp_path, command, photo):
    more = () if command == "eval-fid" else ("--out", tmp_path / "out")
    ending = ldm(*COMMANDS[command](networks["tokens"], photo), *more)
    assert ending.code in (2, 4) and (NO_ENCODER in ending.line or NO_STAGE in ending.line), ending.stderr


def test_the_cost_of_tokens_is_that_of_the_longest_caption(networks):
    model = ldmcli.load(networks["tokens"])
    example = model.conditions.example((16, 16))
    assert example["tokens.tokens"].shape == (1, 77, model.conditions.context_dim)
    with pytest.raises(ModelError, match=NO_STAGE):
        model.autoencoder.decode(example["tokens.tokens"].new_zeros(1, 4, 16, 16))


@pytest.mark.parametrize("name", ["latents", "tokens"])
def test_such_a_network_goes_back_alone(networks, tmp_path, name):
    """A pipeline would ask it for pictures."""
    assert ldm("convert", networks[name], tmp_path / "out", "--to", "diffusers").code == 0
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "model_index.json").exists()
    one, other = ldmcli.load(networks[name]), ldmcli.load(tmp_path / "out")
    assert one.fingerprint == other.fingerprint
