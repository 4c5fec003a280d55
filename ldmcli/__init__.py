"""`ldmcli`: train, use and measure latent diffusion models. `import ldmcli` loads no torch until a part is used."""

__version__ = "0.1.0"

_LAZY = {
    "load": "ldmcli.sampling.load",
    "load_classifier": "ldmcli.sampling.classifier",
    "evaluate": "ldmcli.evaluation.evaluate",
    "metrics_from_features": "ldmcli.maths.metrics",
    "frechet": "ldmcli.maths.metrics",
    "image_metrics": "ldmcli.maths.metrics",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'ldmcli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__():
    return sorted(__all__)
