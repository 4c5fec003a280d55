"""How many attention heads a UNet of CompVis/latent-diffusion has, where its weights fit several numbers."""

from collections.abc import Sequence
from dataclasses import replace

from ldmcli.core.errors import ModelError
from ldmcli.core.presets import MODELS
from ldmcli.core.settings import DiffusionSettings

ONE_HEAD = ("cin256", "text2img256", "layout2img-openimages256")


def published(settings: DiffusionSettings, in_channels: int, context_dim: int | None) -> list[str]:
    """Names of the published models whose UNet has these shapes."""
    names = "channels channel_mult num_res_blocks spatial_transformer scale_shift resblock_updown transformer_depth"
    found = []
    for name, preset in MODELS.items():
        own = DiffusionSettings(
            **{key.partition(".")[2]: value for key, value in preset.values.items() if key.startswith("diffusion.")}
        )
        attends = [{2**k for k in range(len(own.channel_mult))} & set(s.attention_resolutions) for s in (own, settings)]
        if (
            all(getattr(own, key) == getattr(settings, key) for key in names.split())
            and attends[0] == attends[1]
            and (preset.extra["in_channels"], preset.extra["context_dim"]) == (in_channels, context_dim)
        ):
            found.append(name)
    return found


def with_heads(
    settings: DiffusionSettings, heads: str, models: Sequence[str], is_open: bool
) -> tuple[DiffusionSettings, list[str]]:
    """The settings with the heads of --heads ("", "legacy", "config", a number), and what to say about it.

    is_open: the configuration gives the width of heads to a spatial transformer, which the code of the first release
    ignored (one head) and later code obeys, with weights of the same shapes.
    """
    wide = f"heads of {settings.head_channels} channels"
    as_configured = f"{settings.num_heads} heads" if settings.num_heads else wide
    if heads not in ("", "legacy", "config") and not (heads.isdecimal() and int(heads) > 0):
        raise ModelError(f"--heads {heads}: legacy (one head), config (as the YAML says) or a number is expected")
    trap = [name for name in models if name in ONE_HEAD]
    count = int(heads) if heads.isdecimal() else 1 if heads == "legacy" or (not heads and is_open and trap) else 0
    if not count:
        other = "; weights of the first release (December 2021) want one: --heads legacy" if is_open else ""
        note = [f"attention: {as_configured}, as the configuration says{other}"] if is_open or heads else []
        return settings, note
    why = f"as {trap[0]} was trained; --heads config takes {as_configured}" if trap and not heads else "as asked for"
    return replace(settings, num_heads=count), [f"attention: {count} head{'s' * (count > 1)}, {why}"]
