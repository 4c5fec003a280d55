"""Durations as people read them: as a clock shows them, with a unit, and as an estimate."""


def format_duration(seconds: float) -> str:
    """Whole seconds as a clock shows them, negative ones as 0: 3725 → "1:02:05", 65.9 → "1:05"."""
    seconds = int(max(seconds, 0))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def duration_with_unit(seconds: float) -> str:
    """The two largest units, the larger one named: 41.3 → "41 s", 468 → "7:48 min", 3725 → "1:02 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{rest:02d} min"


def rough_duration(seconds: float) -> str:
    """An estimate in one unit: 90 → "90 s", 3600 → "60 min", 9000 → "2.5 h", 200,000 → "2.3 days"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
