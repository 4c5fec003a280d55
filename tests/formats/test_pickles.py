"""Files that mean harm, or are something else: one line, code 4, nothing executed, little memory and time."""

import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import ldm

from ldmcli.core.errors import ModelError
from ldmcli.formats.pickles import read_state_dict

STATE = OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.arange(4, dtype=torch.int64), c=torch.ones(3).half())


class Calls:
    """Unpickled by torch or pickle, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluates(Calls):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def refused(path: Path) -> str:
    """The one line that `ldm convert` says of a file, within seconds and half a gigabyte."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    ending = ldm("convert", path, path.with_name("out"))
    assert ending.code == 4, ending.stderr
    lines = ending.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ldm: ") and str(path) in lines[0], ending.stderr
    assert len(lines[0]) < 600
    assert time.process_time() - begun < 20  # of work, however busy the machine; a bomb takes minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
    assert not path.with_name("out").exists() and not list(path.parent.glob(".*.tmp"))
    return lines[0]


@pytest.mark.parametrize("new", (True, False), ids=("zip", "legacy"))
def test_reads_what_torch_writes(tmp_path, new):
    shared = torch.arange(10.0)
    given = {
        **STATE,
        "view": shared[2:8:2],
        "turned": torch.ones(2, 3).t(),
        "same": shared,
        "none": torch.zeros(0, 3),
        "p": torch.nn.Parameter(torch.ones(2)),
        "number": torch.tensor(3.5),
    }
    torch.save(
        {"state_dict": OrderedDict(given), "epoch": 3, "callbacks": {}},
        tmp_path / "x.ckpt",
        _use_new_zipfile_serialization=new,
    )
    found = read_state_dict(tmp_path / "x.ckpt")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[k], given[k]) and found[k].dtype == given[k].dtype for k in given)


def test_state_dict_at_the_top(tmp_path):
    torch.save(dict(STATE), tmp_path / "x.pt")
    assert torch.equal(read_state_dict(tmp_path / "x.pt")["a"], STATE["a"])


def test_objects_of_training_libraries_are_stand_ins(tmp_path, monkeypatch):
    """Callbacks and configurations lie beside published weights; their classes are never looked up."""
    import argparse
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    made = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = made
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    thing = made()
    thing.best = {"score": torch.ones(2)}
    torch.save(
        {
            "state_dict": STATE,
            "callbacks": {made: {"best": 1, "self": thing}},
            "hyper_parameters": argparse.Namespace(a=1),
            "when": {1, 2},
        },
        tmp_path / "x.ckpt",
    )
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_state_dict(tmp_path / "x.ckpt")["a"], STATE["a"])
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("kind", (Calls, Evaluates))
@pytest.mark.parametrize("how", ("zip", "legacy", "pickle", "inside"))
@pytest.mark.parametrize("suffix", (".ckpt", ".bin"))
def test_a_pickle_that_calls(tmp_path, kind, how, suffix):
    path, evil = tmp_path / f"evil{suffix}", kind(tmp_path / "marker")
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": evil}))
    elif how == "inside":
        torch.save({"state_dict": {**STATE, "evil": evil}}, path)
    else:
        torch.save({"state_dict": STATE, "x": evil}, path, _use_new_zipfile_serialization=how == "zip")
    line = refused(path)
    assert "refused" in line and ("system" in line or "eval" in line)
    assert not (tmp_path / "marker").exists()


def nested(path: Path, program: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize(
    "program",
    (
        b"\x80\x02" + b"]" * 3_000_000 + b"a" * 2_999_999 + b".",
        b"\x80\x02)" + b"\x85" * 3_000_000 + b".",
        b"\x80\x02" + b"(" * 3_000_000 + b".",
        b"\x80\x02N" + b"r\xff\xff\xff\x7f" + b".",  # a memo index that a list would be made for
        b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.",  # bytes longer than the file
        b"\x80\x04\x96" + struct.pack("<Q", 2**60) + b"abc.",
        b"\x80\x02}q\x00(" + b"X\x01\x00\x00\x00ah\x00" * 1000 + b"u.",  # a dict in itself
        b"\x80\x02a.",
        b"\x80\x02.",
        b"\x80\x02h\x05.",
        b"",
        b"\x80\x02(l.",
        b"\x80\x02L" + b"9" * 2_000_000 + b"L\n.",
    ),
    ids=range(13),
)
def test_pickles_that_nest_or_lie(tmp_path, program):
    refused(nested(tmp_path / "deep.ckpt", program))


def tensor_program(size: tuple, stride: tuple, offset: int, count: int) -> bytes:
    """The pickle of {"state_dict": {"w": a tensor}} with numbers as given."""

    def numbers(values):
        signs = (b"\xff" if n < 0 else b"\0" for n in values)
        return b"(" + b"".join(b"\x8a\x09" + struct.pack("<q", n) + sign for n, sign in zip(values, signs)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + numbers([count])[1:-1] + b"tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + numbers([offset])[1:-1]
        + numbers(size)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}X\x0a\0\0\0state_dict}X\x01\0\0\0w" + tensor + b"ss."


@pytest.mark.parametrize(
    "size, stride, offset, count, good",
    [
        ((2, 2), (2, 1), 0, 4, True),
        ((2**40,), (1,), 0, 4, False),
        ((2**40,), (0,), 0, 4, False),
        ((2, 2), (2, 1), 1, 4, False),
        ((2, 2), (2, 1), -1, 4, False),
        ((2, -2), (2, 1), 0, 4, False),
        ((4,), (1,), 0, 2**40, False),
        ((1,) * 9, (1,) * 9, 0, 4, False),
    ],
)
def test_tensors_that_lie_about_their_size(tmp_path, size, stride, offset, count, good):
    path = nested(tmp_path / "x.ckpt", tensor_program(size, stride, offset, count))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
    if good:
        assert torch.equal(read_state_dict(path)["w"], torch.arange(4.0).reshape(2, 2))
    else:
        refused(path)


def test_packed_entries(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)
    assert "packed" in refused(path)


@pytest.mark.parametrize("share", (0.0, 0.01, 0.5, 0.99))
@pytest.mark.parametrize("new", (True, False), ids=("zip", "legacy"))
def test_cut_files(tmp_path, share, new):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"w": torch.rand(50_000)}}, path, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path)


def test_a_flipped_byte(tmp_path):
    path = tmp_path / "flipped.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(50_000)}}, path)
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1
    path.write_bytes(data)
    assert "checksum" in refused(path)


def safetensors_file(path: Path, header: dict | bytes, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header, length",
    [
        ({"a": entry(0, 16, [4]), "b": entry(8, 16, [2])}, None),  # overlap
        ({"a": entry(0, 2**50, [2**48])}, None),
        ({"a": entry(0, 16, [2**40])}, None),
        ({"a": entry(0, 16, [2**62, 4])}, None),
        ({"a": entry(16, 0, [4])}, None),
        ({"a": entry(4, 20, [4])}, None),
        ({"a": entry(0, 16, [4], "F99")}, None),
        ({"a": 3}, None),
        (b"[" * 100_000, None),
        (b"{", 2**60),
        ({}, 2**63 - 1),
        (b"\xff\xfe", None),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, header, length):
    refused(safetensors_file(tmp_path / "x.safetensors", header, length=length))


def test_cut_safetensors(tmp_path):
    save_file({"a": torch.rand(1000)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:2000])
    refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", (".ckpt", ".safetensors"))
def test_a_checkpoint_of_something_else(tmp_path, suffix):
    path = tmp_path / f"resnet{suffix}"
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.running_mean": torch.zeros(64), "fc.bias": torch.zeros(9)}
    torch.save(state, path) if suffix == ".ckpt" else save_file(state, path)
    assert "latent-diffusion" in refused(path)


YAMLS = {
    "object": "model: !!python/object/apply:os.system ['touch MARKER']\n",
    "module": "model: !!python/module:os\n",
    "bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
    "deep": "[" * 50_000,
    "text": "nothing",
    "list": "- 1\n- 2\n",
    "binary": "\0\1",
    "unknown target": "model: {target: os.system, params: {}}\n",
    "traversal": "model: {target: ldm.models.autoencoder.AutoencoderKL, params: {ckpt_path: ../../x}}\n",
    "huge": "model: {target: ldm.models.autoencoder.AutoencoderKL, params: {embed_dim: 3, ddconfig: {z_channels: 3, "
    "ch: 99999999999, ch_mult: [1], num_res_blocks: 1}}}\n",
    "many": "model: {target: ldm.models.autoencoder.AutoencoderKL, params: {embed_dim: 3, ddconfig: {z_channels: 3, "
    "ch: 128, ch_mult: [1], num_res_blocks: 16000000}}}\n",
}


@pytest.mark.parametrize("name", YAMLS)
def test_configurations_that_mean_harm(tmp_path, name):
    weights = {"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1)}
    save_file(weights, tmp_path / "x.safetensors")
    (tmp_path / "x.yaml").write_text(YAMLS[name].replace("MARKER", str(tmp_path / "marker")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ending = ldm("convert", tmp_path / "x.safetensors", tmp_path / "out")
    assert ending.code == 4 and len(ending.stderr.strip().splitlines()) == 1, ending.stderr
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 500_000, "kilobytes for what a few bytes claim"
    assert not (tmp_path / "marker").exists() and not (tmp_path / "out").exists()


def test_the_message_names_file_and_reason(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"hello")
    with pytest.raises(ModelError, match=r"x\.ckpt: is neither a zip archive nor a pickle of torch"):
        read_state_dict(tmp_path / "x.ckpt")
