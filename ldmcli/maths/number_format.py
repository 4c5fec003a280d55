"""Number formats of autocast, and what to say where the range of one does not suffice."""

import torch


def narrow_range_advice(dtype: torch.dtype | None) -> str:
    """The end of a message about NaN or Inf that came up in `dtype`: a wider format; "" where there is none to name."""
    if dtype != torch.float16:
        return ""
    return "; or take a format with a wider range than float16, which ends at 65,504: --mixed-precision bf16, or no"


def autocast_format(device: torch.device) -> torch.dtype | None:
    """The format that autocast has here; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
