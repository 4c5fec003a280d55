"""What `ldm sample` and `model.sample` ask of the generator, as plain data."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One call's images. None stands for "what the run's own [sample] settings say"."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    classes: tuple[str, ...] = ()  # names or indices; ("all",) = every class
    layouts: tuple[Path, ...] = ()  # JSON files, of one layout each or a list of them
    maps: tuple[Path, ...] = ()  # pictures of class indices
    n: int | None = None  # images; None = one a prompt, class, layout or map, or the run's sample.n where it takes none
    steps: int | None = None
    guidance: float | dict[str, float] | None = None  # one scale, or one a condition
    guidance_interval: tuple[float, float] | None = None  # share of the noise range, 0 = clean
    seed: int = 0
    sampler: str | None = None
    eta: float | None = None
    size: tuple[int, int] | None = None  # height, width in pixels
    batch_size: int | None = None
    init_image: Path | None = None
    strength: float = 0.8  # share of the way back to noise that the initial image goes
    weights: str = "ema"  # ema | raw
    spacing: str | None = None
