"""`ldm study`: trains and measures what `plan.py` names, run by run, and writes one page and one JSON.

Everything is resumable: a finished training stays as it is, an interrupted one goes on from its checkpoint, and a
measurement is kept under a key of the weights and of how it was made (`measure.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmcli import __version__
from ldmcli.core import console, files, launch, runs
from ldmcli.core.errors import DivergedError, ModelError, UsageError
from ldmcli.core.settings import DiffusionConfig
from ldmcli.reports.report import write_pages
from ldmcli.reports.run_view import read_run
from ldmcli.sampling.load import load
from ldmcli.studies.curves import quality_curves, training_speed
from ldmcli.studies.measure import Bench, measure_first_stage, measure_rate_distortion, measure_sampling, open_bench
from ldmcli.studies.page import write_study_page
from ldmcli.studies.plan import StudyRequest, Training, plan_trainings
from ldmcli.training.loop import RunOptions, train


def study(request: StudyRequest, out: Path, command_line: Sequence[str] = ("ldm", "study")) -> dict[str, Any]:
    """Trains what is missing, measures, and writes study.json and study.html in `out`; returns the JSON's content.

    A training that diverges is told of and left out. Raises what a training raises otherwise, and InputError where
    the feature network has no weights here.
    """
    if launch.world()[1] > 1:
        raise UsageError("ldm study trains one run after the other in one process; start it without a launcher")
    for path in request.runs:
        if runs.read_run(Path(path)).get("kind") != "diffusion":
            raise ModelError(f"--runs {path}: no run of `ldm train-ldm`")
    trainings = plan_trainings(request)
    bench = open_bench(out / "measured", request.features, request.n, request.sampler)
    failed: dict[str, str] = {}
    for position, training in enumerate(trainings, 1):
        console.say(f"study {position}/{len(trainings)}: {training.name}, {training.parameters / 1e6:.2f} M parameters")
        try:
            _train(training, out, failed, command_line)
        except DivergedError as error:
            failed[training.name] = str(error)
            console.warn(f"{training.name} is left out: {error}")
    found = _measure(request, trainings, out, bench, failed)
    files.write_json(out / "study.json", found)
    console.say(f"study: {write_study_page(out, found)}")
    return found


def _train(training: Training, out: Path, failed: dict[str, str], command_line: Sequence[str]) -> None:
    folder, autoencoder = out / training.name, training.autoencoder
    if autoencoder in failed:
        raise DivergedError(f"its first stage {autoencoder} diverged")
    if runs.is_run(folder) and runs.read_run(folder).get("state") == "finished":
        return
    if training.trained_here:
        autoencoder = str(out / autoencoder)
    options = RunOptions(command_line=list(command_line), autoencoder=autoencoder)
    train(training.kind, training.resolved, folder, options)
    write_pages(folder)


# --- measuring -----------------------------------------------------------------------------------------------------


def _measure(
    request: StudyRequest, trainings: Sequence[Training], out: Path, bench: Bench, failed: dict[str, str]
) -> dict[str, Any]:
    """study.json's content."""
    stages = [one for one in trainings if one.kind == "autoencoder" and one.name not in failed]
    models = [one for one in trainings if one.kind == "diffusion" and one.name not in failed]
    named = [(f"first-stages/f{f}", f"f = {f}", Path(path)) for f, path in request.named_autoencoders.items()]
    first_stages = [
        {"name": name, "variant": variant, **run_facts(path), **measure_first_stage(bench, name, path)}
        for name, variant, path in [*((one.name, one.variant, out / one.name) for one in stages), *named]
    ]
    found = [_measure_model(request, bench, one.name, one.variant, one.seed, out / one.name) for one in models]
    for name, path in distinct_names(request.runs).items():
        found.append(_measure_model(request, bench, name, name, None, path))
    machine = next((one["machine"] for one in found if one.get("machine")), None)
    return {
        "ldm": __version__,
        "machine": machine,
        "extractor": bench.extractor.protocol,
        "n": bench.n,
        "sampler": bench.sampler,
        "minutes": request.minutes,
        "steps": request.steps,
        "data": found[0]["data"] if found else None,
        "first_stages": first_stages,
        "models": found,
        "failed": failed,
    }


def _measure_model(
    request: StudyRequest, bench: Bench, name: str, variant: str, seed: int | None, run: Path
) -> dict[str, Any]:
    model: Any = load(run)
    console.say(f"study: measuring {name}")
    sampling = [measure_sampling(bench, name, model, steps) for steps in sorted(request.sampling_steps)]
    return {
        "name": name,
        "variant": variant,
        "seed": seed,
        "f": model.autoencoder.network.f,
        "latent": list(model.network.latent_shape),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        **run_facts(run),
        "sampling": sampling,
        "rate_distortion": measure_rate_distortion(bench, name, model),
    }


def distinct_names(paths: Sequence[str]) -> dict[str, Path]:
    """{name: path} of finished runs: the folder's name, with as many of the folders around it as tell them apart."""
    places = list(dict.fromkeys(Path(path).absolute() for path in paths))
    for length in range(1, max((len(place.parts) for place in places), default=1) + 1):
        named = {"-".join(place.parts[-length:]).strip("/-"): place for place in places}
        if len(named) == len(places):
            break
    return named


def run_facts(path: Path) -> dict[str, Any]:
    """What a run's own files say of its training: steps, seconds, images a second, curves of quality."""
    run = read_run(path)
    config = run.config
    facts: dict[str, Any] = {
        "steps": run.state.get("step"),
        "trained_seconds": run.state.get("trained_seconds"),
        "machine": run.state.get("machine"),
        "data": run.state.get("data"),
        "training_images_per_s": training_speed(run.log),
        "curves": quality_curves(run.log),
    }
    if isinstance(config, DiffusionConfig):
        facts["size"] = list(config.data.size)
    return facts
