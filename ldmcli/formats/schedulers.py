"""scheduler_config.json of diffusers <-> our noise schedule, sampler and timesteps.

Betas and parametrisation must be expressible; a sampler that is not is replaced by DDIM and that is noted, since a
scheduler is exchangeable in diffusers, too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmcli.core.errors import ModelError
from ldmcli.core.settings import DiffusionSettings, SampleSettings
from ldmcli.formats.diffusers_files import Config

BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SHARED: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
_CLIPPING = {"clip_sample": True, "thresholding": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _SHARED | _CLIPPING | {"set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"},
    "DDPMScheduler": _SHARED
    | _CLIPPING
    | {"steps_offset": 0, "timestep_spacing": "leading", "variance_type": "fixed_small"},
    "PNDMScheduler": _SHARED
    | {"skip_prk_steps": False, "set_alpha_to_one": False, "steps_offset": 0, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": _SHARED
    | {
        "steps_offset": 0,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    },
    "DPMSolverMultistepScheduler": _SHARED
    | {
        "steps_offset": 0,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
    },
}
# What a sampler needs in order to be ours: key -> the value that means "off", or the only one there is here.
_PLAIN_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_NEEDED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": False, "thresholding": False},
    "DDPMScheduler": {"clip_sample": False, "thresholding": False, "variance_type": "fixed_small"},
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": _PLAIN_SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"},
    "DPMSolverMultistepScheduler": _PLAIN_SIGMAS
    | {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
    },
}
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpm++",
}


def read_scheduler(
    path: Path, values: dict[str, Any], process: DiffusionSettings, sample: SampleSettings
) -> tuple[DiffusionSettings, SampleSettings, list[str]]:
    """The process and the way of sampling that a scheduler's configuration describes, and notes on what differs.

    Raises ModelError, naming the key, for betas or a parametrisation that are not ours, and for flow matching, whose
    networks take other timesteps than ours (1000 σ instead of 1000 σ - ½).
    """
    class_name = values.get("_class_name", "")
    config = Config(path, values, DEFAULTS.get(class_name, _SHARED))
    if "FlowMatch" in class_name or config["prediction_type"] == "flow_prediction":
        raise ModelError(
            f"{path}: {class_name}: flow matching of diffusers tells its networks 1000 σ, ours are told "
            "1000 σ - ½; only flow models that were exported from here are read"
        )
    process = _process(config, process)
    notes = [
        f"scheduler {class_name or 'unnamed'}: {key} = {config[key]!r} is not known here, DDIM takes its place"
        for key, value in _NEEDED.get(class_name, {}).items()
        if config[key] != value
    ]
    if class_name not in SAMPLERS:
        notes = [f"scheduler {class_name or 'unnamed'} is not known here, DDIM takes its place"]
    if notes:
        return process, replace(sample, sampler="ddim", spacing="leading+1/first"), notes
    spacing, more = _spacing(config, class_name)
    return process, replace(sample, sampler=SAMPLERS[class_name], spacing=spacing), more


def _process(config: Config, settings: DiffusionSettings) -> DiffusionSettings:
    config.only(
        trained_betas=(None,),
        rescale_betas_zero_snr=(False, None),
        beta_schedule=tuple(BETAS),
        prediction_type=tuple(PREDICTIONS),
    )
    for key in ("beta_start", "beta_end"):
        if isinstance(config[key], bool) or not isinstance(config[key], (int, float)) or not 0 < config[key] < 1:
            raise config.refuse(key, "a number between 0 and 1 is expected")
    return replace(
        settings,
        prediction=PREDICTIONS[config["prediction_type"]],
        schedule=BETAS[config["beta_schedule"]],
        beta_start=float(config["beta_start"]),
        beta_end=float(config["beta_end"]),
        timesteps=config.integer("num_train_timesteps"),
        t_sampling="uniform",
    )


def _spacing(config: Config, class_name: str) -> tuple[str, list[str]]:
    """Our name of the timesteps and of where the last step ends, and what differs all the same."""
    config.only(timestep_spacing=("leading", "trailing", "linspace"), steps_offset=(0, 1))
    name, notes = config["timestep_spacing"], []
    if name == "leading":
        open_end = "_open" if class_name == "DPMSolverMultistepScheduler" else ""
        name = f"leading{open_end}{'+1' if config['steps_offset'] else ''}"
    elif name == "linspace":
        name = {"EulerDiscreteScheduler": "linspace_real", "DPMSolverMultistepScheduler": "linspace_open"}.get(
            class_name, "linspace"
        )
        if name == "linspace":
            notes.append("timestep_spacing = 'linspace': steps end where the next begins, not T // N earlier")
    if class_name == "EulerDiscreteScheduler" and config["timestep_spacing"] != "leading":
        notes.append(
            "initial noise has variance 1 here; EulerDiscreteScheduler scales it by σ/√(1 + σ²), which is all but 1"
        )
    if "final_sigmas_type" in DEFAULTS[class_name]:
        config.only(final_sigmas_type=("zero", "sigma_min"))
        low = "sigma_min" if class_name == "EulerDiscreteScheduler" else "first"
        ending = "clean" if config["final_sigmas_type"] == "zero" else low
        if class_name == "DPMSolverMultistepScheduler" and ending == "first":
            notes.append(
                "final_sigmas_type = 'sigma_min': with 15 steps or more the last, long one is extrapolated "
                "less far than in diffusers"
            )
    elif class_name == "DDPMScheduler":
        ending = "clean"
    else:
        ending = "clean" if config["set_alpha_to_one"] else "first"
    return f"{name}/{ending}", notes


def write_scheduler(process: DiffusionSettings, sample: SampleSettings) -> dict[str, Any]:
    """scheduler_config.json: PLMS, DPM-Solver++ or DDIM as the run samples, everything that matters written out.

    Spacings without a counterpart become the one next to them: leading with offset 1, or linspace for DPM-Solver++.
    """
    name, _, ending = sample.spacing.partition("/")
    ending = ending or ("first" if name.startswith("original") else "clean")
    names = {ours: theirs for theirs, ours in BETAS.items()}
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    shared = {
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": process.timesteps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": names[process.schedule],
        "trained_betas": None,
        "prediction_type": predictions[process.prediction],
        "steps_offset": 0 if name in ("leading", "leading_open", "trailing", "uniform") else 1,
    }
    leading = {"timestep_spacing": "trailing" if name in ("trailing", "uniform") else "leading"}
    if sample.sampler == "dpm++":
        spacing = "leading" if name.startswith("leading_open") else "trailing" if name == "trailing" else "linspace"
        offset = 1 if name.endswith("+1") and spacing == "leading" else 0
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            **shared,
            "steps_offset": offset,
            "timestep_spacing": spacing,
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "thresholding": False,
            "final_sigmas_type": "zero" if ending == "clean" else "sigma_min",
        }
    if sample.sampler == "plms":
        return {
            "_class_name": "PNDMScheduler",
            **shared,
            **leading,
            "skip_prk_steps": True,
            "set_alpha_to_one": ending == "clean",
        }
    return {
        "_class_name": "DDIMScheduler",
        **shared,
        **leading,
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": ending == "clean",
        "rescale_betas_zero_snr": False,
    }


def why_not(process: DiffusionSettings) -> str:
    """ "" where a scheduler of diffusers knows the process, else the reason for which none does."""
    if process.prediction == "flow":
        return "a flow whose timesteps are half a step off those of diffusers"
    if process.schedule not in BETAS.values():
        return f"the noise schedule {process.schedule!r}"
    return ""
