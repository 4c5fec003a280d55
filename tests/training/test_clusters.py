"""Launchers of others, replicas, models cut into parts, and processes that end."""

import os
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from processes import ranks

import ldmcli
from ldmcli.core import files, runs
from ldmcli.training import latents
from ldmcli.training.distributed import checksum


@pytest.mark.parametrize(
    "variable, name",
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_a_configuration_of_accelerate_that_splits_models_is_refused_by_name(variable, name, tmp_path, monkeypatch):
    """Before anything is loaded or written; what to do instead is said."""
    monkeypatch.setenv(variable, "true")
    ending = tiny.train_ae(tmp_path / "run", code=2)
    assert f"Accelerate is set up for {name}, " in ending.line and "train.shard=true" in ending.line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_whatever_else_makes_accelerate_split_models_is_refused_too(kind, tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType[kind])
    assert f"Accelerate is set up for {kind}, " in tiny.train_ae(tmp_path / "run", code=2).line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_any_changed_bit_changes_the_sum_that_replicas_are_compared_by(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for _ in range(4)] + [torch.zeros(0)]
    known = checksum(tensors)
    assert known == checksum([tensor.clone() for tensor in tensors])
    for tensor in tensors[:4]:
        raw = tensor.view(torch.uint8).reshape(-1)
        for place in range(0, len(raw), 7):
            raw[place] ^= 1
            assert checksum(tensors) != known
            raw[place] ^= 1
    assert checksum(tensors[::-1]) != known


def test_a_zero_with_another_sign_is_another_weight():
    assert checksum([torch.tensor([0.0])]) != checksum([torch.tensor([-0.0])])


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_resume_hashes_each_byte_once(tmp_path, monkeypatch):
    out, hashed, one = tmp_path / "run", [], files.sha256_file
    tiny.train_ae(out, "--save-every", 2, steps=4)
    monkeypatch.setattr(files, "sha256_file", lambda path: (hashed.append(path), one(path))[1])
    monkeypatch.setattr(files, "tensors_hash", None)
    tiny.train_ae(out, "--save-every", 2, steps=5)
    newest = out / "checkpoints" / "step-00000004"
    read = [path.name for path in hashed if path.parent == newest]
    assert sorted(read) == sorted(path.name for path in newest.iterdir() if path.name != "manifest.json")


def read_by_rank_0_alone() -> None:
    """What the other processes would read from checkpoints is not there for them."""
    if os.environ["RANK"] != "0":
        files.load_tensors = files.sha256_file = runs.newest_checkpoint = None


def test_the_other_processes_go_on_without_reading_a_checkpoint(tmp_path):
    """Nor do they need to see its files: on another machine these may come late."""
    line = ("train-ae", *tiny.SHAPES, *tiny.AE_NETWORK, *tiny.QUIET_LOOP, "--log-every", 1, "--set", "train.cooldown=0")
    for steps in (2, 4):
        both = ranks(tmp_path, 2, *line, "--steps", steps, "--out", tmp_path / "run", before=read_by_rank_0_alone)
        assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    whole = tmp_path / "whole"
    assert tiny.ldm(*line, "--steps", 4, "--out", whole).code == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def losses(run: Path) -> list[float]:
    """Of each step."""
    named = ({k: v for k, v in entry.items() if k.startswith("loss_")} for entry in tiny.log(run))
    return [value for found in named for value in found.values()]


def on_its_own_machine(folder: Path, caches: bool) -> None:
    """Each process is alone on its machine, and sees no file that another one writes but those below `folder`."""
    own = folder / f"machine-{os.environ['RANK']}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if caches:
        latents.LATE_SECONDS = 2.0
        os.environ["LDM_CACHE"] = str(own / "cache")


def test_what_rank_0_writes_is_not_looked_for_by_processes_of_other_machines(of_one_process, tmp_path):
    """Tokeniser, statistics, checkpoints: begun and gone on with, the run of one process."""
    for steps in (3, 6):
        line = diffusion(of_one_process, "--out", "run", steps=steps)
        both = ranks(tmp_path, 2, *line, before=partial(on_its_own_machine, tmp_path, False))
        assert [command.wait() for command in both] == [0, 0], both[0].stderr + both[1].stderr
    assert not (tmp_path / "machine-1/run").exists()
    assert losses(tmp_path / "machine-0/run") == pytest.approx(losses(of_one_process / "run"), rel=1e-5)


def test_caches_that_only_their_own_process_sees_end_the_command_with_code_6(of_one_process, tmp_path):
    """With what to do in the line, and before step 1."""
    line = diffusion(of_one_process, "--out", "run", "--set", "data.cache_dir=", steps=1)
    both = ranks(tmp_path, 2, *line, before=partial(on_its_own_machine, tmp_path, True))
    assert [command.wait() for command in both] == [6, 6], both[0].stderr + both[1].stderr
    assert "all processes must see one cache (data.cache_dir or LDM_CACHE)" in both[0].stderr
    assert not (tmp_path / "machine-0/run/metrics.jsonl").exists()


# --- processes that end ----------------------------------------------------------------------------------------------


def break_down(rank: int, method: str) -> None:
    from ldmcli.training.loop import Trainer

    inner = getattr(Trainer, method)

    def breaking(self, *args):
        if self.dist.rank == rank and self.progress.step == 2:
            raise ValueError("a fault")
        return inner(self, *args)

    setattr(Trainer, method, breaking)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("method", ["_train_step", "_forward_backward", "_after_step"])
def test_a_fault_of_one_process_ends_the_others_with_code_6(rank, method, tmp_path):
    """Whether they wait for its batch, its gradients or its word; and none hangs while it leaves."""
    line = ("train-ae", *tiny.SHAPES, *tiny.AE_NETWORK, *tiny.QUIET_LOOP, "--steps", 9, "--out", tmp_path / "run")
    both = ranks(tmp_path, 2, *line, before=partial(break_down, rank, method))
    codes = [command.wait(60) for command in both]
    assert codes == [1 if one == rank else 6 for one in (0, 1)], both[0].stderr + both[1].stderr
    other = both[1 - rank].stderr.splitlines()
    assert rank == 0 or "another process of this training ended" in other[-1]
    assert tiny.state(tmp_path / "run")["exit_code"] == codes[0]


# --- models that are cut ---------------------------------------------------------------------------------------------


def diffusion(folder: Path, *more, steps: int) -> list:
    own = ("--data", "shapes", "--limit", 10, "--size", "20x20", "--condition", "class+text", *tiny.UNET, *tiny.ADAM)
    own = (*own, "--autoencoder", folder / "ae", "--set", f"data.cache_dir={folder / 'cache'}", "--lr", 1e-3)
    loop = ("--log-every", 1, "--sample-every", 2, "--save-every", 2, "--micro-batch", 1, "--steps", steps)
    return ["train-ldm", *own, *tiny.QUIET_LOOP, *loop, "--set", "train.cooldown=0", *more]


@pytest.fixture(scope="module")
def of_one_process(ae, tmp_path_factory) -> Path:
    """A folder with a diffusion run of six steps that nobody cut."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "ae").symlink_to(ae)
    assert tiny.ldm(*diffusion(folder, "--out", folder / "run", steps=6)).code == 0
    return folder


def close(ours: dict, theirs: dict) -> None:
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    for name, tensor in theirs.items():
        # by its norm: AdamW makes a whole step of the rounding of a gradient near 0
        apart = float((ours[name] - tensor).double().norm())
        assert apart <= 1e-3 * float(tensor.double().norm()) + 1e-6, (name, apart)


def test_a_model_that_is_cut_learns_what_a_whole_one_does_and_either_goes_on_as_the_other(of_one_process, tmp_path):
    """Cut to step 2, whole to 4, cut to 6: the losses, checkpoints and weights for use of one process."""
    folder, out = of_one_process, tmp_path / "run"
    for steps, cut in ((2, True), (4, False), (6, True)):
        line = diffusion(folder, "--out", out, "--set", f"train.shard={str(cut).lower()}", steps=steps)
        both = ranks(tmp_path, 2, *line)
        assert [command.wait(120) for command in both] == [0, 0], both[0].stderr + both[1].stderr
    for name, rel in (("loss_model", 1e-6), ("grad_norm_model", 1e-4)):
        ours, theirs = ([line[name] for line in tiny.log(run) if name in line] for run in (out, folder / "run"))
        assert len(ours) == 6 and ours == pytest.approx(theirs, rel=rel), name
    close(tiny.checkpoint(out), tiny.checkpoint(folder / "run"))
    close(tiny.weights(out), tiny.weights(folder / "run"))
    assert (out / "samples/step-00000002.png").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (("--set", "train.optimizer=adamw"), "one process has nobody to share a model with"),
        (("--set", "train.optimizer=muon"), "Muon needs whole matrices"),
        (("--set", "train.optimizer=adamw", "--compile"), "are not compiled"),
    ],
)
def test_what_a_model_that_is_cut_cannot_be_is_refused(more, message, of_one_process, tmp_path):
    line = diffusion(of_one_process, "--out", tmp_path / "run", "--set", "train.shard=true", *more, steps=1)
    ending = tiny.ldm(*line)
    assert ending.code == 2 and message in ending.line


def test_only_diffusion_models_are_cut(tmp_path):
    ending = tiny.train_ae(tmp_path / "run", *tiny.ADAM, "--set", "train.shard=true", code=2)
    assert "only diffusion models are cut" in ending.line


def test_the_blocks_of_a_unet_and_the_layers_of_a_text_transformer_are_gathered_one_by_one(of_one_process):
    """Not all weights at once, and none twice."""
    from ldmcli.training.sharding import blocks

    model = ldmcli.load(of_one_process / "run").network
    found = blocks(model)
    inside = [p for block in found for p in block.parameters()]
    assert len(inside) == len(set(inside)) and model.unet.middle_block in found
    assert all(block in found for block in (*model.unet.input_blocks, *model.unet.output_blocks))
    assert any(name.startswith("conditions.") and part in found for name, part in model.named_modules())
