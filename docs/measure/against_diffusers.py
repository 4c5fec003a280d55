"""`ldm` against diffusers with the same weights: ratios of speed, in alternating rounds.

    make bench-peers                              # about 11 minutes on two quiet cores
    make bench-peers PEERS_OPTIONS=--quick        # batch 16 alone, about 6
    .venv-peers/bin/python docs/measure/against_diffusers.py --threads 1 --batches 16 --json peers.json

Networks (random weights, ours exported to stock classes of diffusers, which load them): `unet`, 64 wide, multipliers
1, 2, 4, attention on all levels, residual resampling, latents of 16x16; `text`, the same with cross-attention to 77
tokens of 256, sampled with guidance 3 (null and given); `ae`, 64 wide, multipliers 1, 2, 4, KL, pictures of 64 px.
A training step is loss, backward pass and fused AdamW; sampling is DDIM.

Each side is a process of its own and takes the fastest of its variants: float32 or bf16 (autocast), for diffusers
contiguous or channels_last. First all outputs are compared in float32; then the two sides take turns. Printed: images/s
of both (median of the rounds), the variants, and the ratio; above 1 `ldm` is faster.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

GUIDANCE, STEPS, TOKENS, WIDTH = 3.0, 4, 77, 256
CASES = ("unet train", "unet sample", "text train", "text sample", "ae train", "ae decode")
CLOSE = 1e-4  # of outputs in float32, as a share of their largest value


# --- either side ---------------------------------------------------------------------------------------------------


def settings_of(name: str):
    from ldmcli.core.settings import AutoencoderSettings, DiffusionSettings

    if name == "ae":
        return AutoencoderSettings(family="paper", f=4, channels=64, channel_mult=(1, 2, 4))
    return DiffusionSettings(
        channels=64,
        channel_mult=(1, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(1, 2, 4),
        spatial_transformer=name == "text",
        scale_shift=True,
        resblock_updown=name == "unet",
        position="none",
        prediction="eps",
    )


def network_of(name: str):
    """The network with weights drawn at random, none of them 0."""
    import torch

    from ldmcli.core.settings import ConditionSettings
    from ldmcli.networks.autoencoder import Autoencoder
    from ldmcli.networks.latent_diffusion import DiffusionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "ae":
            network = Autoencoder(settings_of(name))
        else:
            kinds = ("tokens",) if name == "text" else ()
            condition = ConditionSettings(kinds=kinds, context_dim=WIDTH, text_pooled=False)
            network = DiffusionModel(settings_of(name), condition, {"tokens": {}}, None, (4, 16, 16))
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return network


def inputs_of(name: str, batch: int) -> dict:
    import torch

    draw = torch.Generator().manual_seed(batch)
    if name == "ae":
        x = torch.rand(batch, 3, 64, 64, generator=draw) * 2 - 1
        return {"x": x, "z": torch.randn(batch, 4, 16, 16, generator=draw)}
    return {
        "z": torch.randn(batch, 4, 16, 16, generator=draw),
        "noise": torch.randn(batch, 4, 16, 16, generator=draw),
        "t": torch.randint(0, 1000, (batch,), generator=draw),
        "given": torch.randn(batch, TOKENS, WIDTH, generator=draw),
        "null": torch.randn(1, TOKENS, WIDTH, generator=draw).repeat(batch, 1, 1),
    }


def autocast(variant: str):
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled="bf16" in variant)


def timed(work, calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begun) / calls


class Ours:
    """`ldm`: the loss, optimiser, sampler and guidance of the package."""

    variants = ("float32", "bf16")

    def __init__(self):
        self.networks = {name: network_of(name) for name in ("unet", "text", "ae")}
        self.optimizers = {}

    def work(self, case: str, batch: int, variant: str, steps: int):
        """The function that a round times."""
        name, what = case.split()
        network, given = self.networks[name], inputs_of(name, batch)
        network.requires_grad_(what == "train").train(what == "train")
        if what == "train":
            return partial(self._train, name, network, given, variant)
        if what == "decode":
            return partial(self._decode, network, given, variant)
        return partial(self._sample, name, network, given, variant, steps)

    def _train(self, name, network, given, variant):
        from ldmcli.core.settings import LossSettings, TrainSettings
        from ldmcli.diffusion.loss import diffusion_loss
        from ldmcli.diffusion.schedule import make_schedule
        from ldmcli.networks.losses import generator_loss
        from ldmcli.training.optimizer import PhaseOptimizer

        if name not in self.optimizers:
            settings = TrainSettings(optimizer="adamw", lr=1e-5)
            self.optimizers[name] = PhaseOptimizer(network.named_parameters(), settings)
        self.optimizers[name].zero_grad()
        with autocast(variant):
            if name == "ae":
                found = network(given["x"], given["z"])
                terms, kl = LossSettings(l1=1.0, l2=0.0, edge=0.0), network.kl(found.moments)
                loss, _ = generator_loss(
                    "kl", given["x"], found.reconstruction, kl, terms, last_layer=network.last_layer
                )
            else:
                settings = settings_of(name)
                told = {"tokens.tokens": given["given"]} if name == "text" else {}
                losses = diffusion_loss(
                    network, make_schedule(settings), settings, given["z"], given["noise"], given["t"].float(), told
                )
                loss = losses.mean()
        loss.backward()
        self.optimizers[name].step(1.0)
        return loss

    def _decode(self, network, given, variant):
        import torch

        with torch.no_grad(), autocast(variant):
            return network.decode(given["z"])

    def _sample(self, name, network, given, variant, steps):
        import torch

        from ldmcli.core.settings import SampleSettings
        from ldmcli.diffusion.guidance import GuidancePath
        from ldmcli.diffusion.sample import sample_latents
        from ldmcli.diffusion.schedule import make_schedule
        from ldmcli.networks.conditioners import Conditioning
        from ldmcli.sampling.machine import cast_once

        path = GuidancePath((Conditioning(),))
        if name == "text":
            path = GuidancePath((Conditioning(given["null"]), Conditioning(given["given"])), (GUIDANCE,))
        settings = SampleSettings(sampler="ddim", steps=steps, spacing="leading")
        with torch.no_grad(), autocast(variant), cast_once(network):
            return sample_latents(
                network.predict,
                make_schedule(settings_of(name)),
                settings,
                path,
                lambda *purpose: None,
                ids=range(len(given["z"])),
                z_T=given["z"],
            )


class Theirs:
    """diffusers: its networks and scheduler, in the loop that its examples have."""

    variants = ("float32", "float32 channels_last", "bf16", "bf16 channels_last")

    def __init__(self):
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel

        from ldmcli.core.settings import SampleSettings
        from ldmcli.formats.diffusers_unet_write import write_unet
        from ldmcli.formats.diffusers_vae import write_vae
        from ldmcli.formats.schedulers import write_scheduler
        from ldmcli.networks.latent_scale import LatentScale

        self.networks, self.optimizers, self.formats = {}, {}, {}
        for name, kind in (("unet", UNet2DModel), ("text", UNet2DConditionModel)):
            tensors = {k.removeprefix("unet."): v for k, v in network_of(name).state_dict().items()}
            sizes = {"in_channels": 4, "out_channels": 4, "sample_size": (16, 16)}
            context = WIDTH if name == "text" else None
            config, weights = write_unet(settings_of(name), tensors, context_dim=context, **sizes)
            self.networks[name] = kind.from_config(config)
            self.networks[name].load_state_dict(weights)
        settings, scale = settings_of("ae"), LatentScale.identity(4)
        config, weights, _ = write_vae(settings, network_of("ae").state_dict(), scale, side=64, factor_read=True)
        self.networks["ae"] = AutoencoderKL.from_config(config)
        self.networks["ae"].load_state_dict(weights)
        chosen = SampleSettings(sampler="ddim", spacing="leading")
        self.scheduler = DDIMScheduler.from_config(write_scheduler(settings_of("unet"), chosen))

    def work(self, case: str, batch: int, variant: str, steps: int):
        """The function that a round times."""
        import torch

        name, what = case.split()
        network, given = self.networks[name], inputs_of(name, batch)
        last = torch.channels_last if "channels_last" in variant else torch.contiguous_format
        if self.formats.get(name) != last:
            network.to(memory_format=last)
            self.formats[name] = last
            self.optimizers.pop(name, None)
        given = {k: v.to(memory_format=last) if v.ndim == 4 else v for k, v in given.items()}
        network.requires_grad_(what == "train").train(what == "train")
        if what == "train":
            return partial(self._train, name, network, given, variant)
        if what == "decode":
            return partial(self._decode, network, given, variant)
        return partial(self._sample, name, network, given, variant, steps)

    def _train(self, name, network, given, variant):
        import torch
        import torch.nn.functional as F

        if name not in self.optimizers:
            self.optimizers[name] = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.optimizers[name].zero_grad()
        with autocast(variant):
            if name == "ae":
                posterior = network.encode(given["x"]).latent_dist
                rec = network.decode(posterior.mean + posterior.std * given["z"]).sample
                # terms as ours has them: means over elements, KL in nats over the latent
                loss = F.l1_loss(rec.float(), given["x"]) + 1e-6 * posterior.kl().mean() / given["x"][0].numel()
            else:
                t = given["t"]
                z_t = self.scheduler.add_noise(given["z"], given["noise"], t)
                told = {"encoder_hidden_states": given["given"]} if name == "text" else {}
                loss = F.mse_loss(network(z_t, t, **told).sample.float(), given["noise"])
        loss.backward()
        self.optimizers[name].step()
        return loss

    def _decode(self, network, given, variant):
        import torch

        with torch.no_grad(), autocast(variant):
            return network.decode(given["z"]).sample

    def _sample(self, name, network, given, variant, steps):
        import torch

        self.scheduler.set_timesteps(steps)
        z = given["z"]
        both = torch.cat([given["null"], given["given"]])
        with torch.no_grad(), autocast(variant):
            for t in self.scheduler.timesteps:
                if name == "text":
                    out = network(torch.cat([z, z]), t, encoder_hidden_states=both).sample
                    null, told = out.chunk(2)
                    out = null + GUIDANCE * (told - null)
                else:
                    out = network(z, t).sample
                z = self.scheduler.step(out.float(), t, z).prev_sample
        return z


def serve(side: str) -> None:
    """Answers the requests on stdin, one JSON document a line."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    peer = Ours() if side == "ours" else Theirs()
    print(json.dumps({"variants": peer.variants}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        work = peer.work(asked["case"], asked["batch"], asked["variant"], asked["steps"])
        if "save" in asked:
            torch.save(work().detach(), asked["save"])
            answer = {}
        else:
            answer = {"seconds": timed(work, asked["calls"])}
        print(json.dumps(answer), file=answers, flush=True)


# --- the two sides in turns ------------------------------------------------------------------------------------------


class Side:
    """A process of one side."""

    def __init__(self, name: str, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.variants = self._answer()["variants"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side has ended; what it said stands above")
        return json.loads(line)

    def ask(self, **request) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def seconds(self, case: str, batch: int, variant: str, calls: int = 1, steps: int = STEPS) -> float:
        return self.ask(case=case, batch=batch, variant=variant, calls=calls, steps=steps)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare_outputs(sides: dict[str, Side], folder: Path) -> dict[str, float]:
    """Largest difference of each case in float32, as a share of the largest value; before anything is trained."""
    import torch

    found = {}
    for case in [case for case in CASES if not case.endswith("train")] + ["ae train"]:
        outputs = []
        for name, side in sides.items():
            path = folder / f"{name}.pt"
            side.ask(case=case, batch=4, variant="float32", calls=1, steps=STEPS, save=str(path))
            outputs.append(torch.load(path))
        a, b = outputs
        found[case] = float((a - b).abs().max() / b.abs().max())
    return found


def fastest(side: Side, case: str, batch: int) -> str:
    """The variant that takes least time for one call, after a small one to warm up."""
    took = {}
    for variant in side.variants:
        side.seconds(case, min(batch, 4), variant, steps=1)
        took[variant] = side.seconds(case, batch, variant, steps=2)
    return min(took, key=took.__getitem__)


def race(sides: dict[str, Side], case: str, batch: int, variants: dict[str, str], seconds: float) -> dict:
    """Alternating rounds for about `seconds` a side; at least two."""
    first = {name: side.seconds(case, batch, variants[name], steps=1) for name, side in sides.items()}
    longest = max(first.values()) * (STEPS if case.endswith("sample") else 1)
    calls = max(1, int(seconds / 5 / longest))
    rounds = max(2, min(5, int(seconds / longest / calls)))
    took: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            took[name].append(sides[name].seconds(case, batch, variants[name], calls))
    middle = {name: median(values) for name, values in took.items()}
    spread = max((max(values) - min(values)) / 2 / middle[name] for name, values in took.items())
    return {
        "images_per_s": {name: batch / value for name, value in middle.items()},
        "ratio": middle["theirs"] / middle["ours"],
        "spread": spread,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side and line")
    parser.add_argument("--quick", action="store_true", help="batch 16 alone")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve)
        return
    batches, rows, outputs = [16] if asked.quick else asked.batches, [], {}
    print("threads  case         batch  ldm img/s  diffusers  ratio   ±%  variants", flush=True)
    for threads in asked.threads:
        sides = {name: Side(name, threads) for name in ("ours", "theirs")}
        if not outputs:
            with tempfile.TemporaryDirectory() as folder:
                outputs = compare_outputs(sides, Path(folder))
            worst = max(outputs.values())
            print(f"outputs in float32 differ by {worst:.2g} of the largest value at most", flush=True)
            if worst > CLOSE:
                raise SystemExit(f"outputs differ: {outputs}")
        for case in asked.cases:
            variants = {
                name: fastest(side, case, min(batches, key=lambda b: abs(b - 16))) for name, side in sides.items()
            }
            for batch in batches:
                row = {"threads": threads, "case": case, "batch": batch, "variants": variants}
                row |= race(sides, case, batch, variants, asked.seconds)
                rows.append(row)
                ours, theirs = row["images_per_s"]["ours"], row["images_per_s"]["theirs"]
                print(
                    f"{threads:7}  {case:11}  {batch:5}  {ours:9.3g}  {theirs:9.3g}  {row['ratio']:5.2f}  "
                    f"{100 * row['spread']:3.0f}  {variants['ours']} / {variants['theirs']}",
                    flush=True,
                )
        for side in sides.values():
            side.close()
    if asked.json:
        asked.json.write_text(json.dumps({"outputs": outputs, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
