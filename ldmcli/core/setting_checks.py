"""Checks of single settings, for the sections of `core.settings`: each raises UsageError, naming the setting."""

from ldmcli.core.errors import UsageError


def choice(section: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in allowed:
        raise UsageError(f"{section}.{name} = {value!r}: choose one of {', '.join(allowed)}")


def positive(section: str, values: dict[str, float]) -> None:
    """Numbers above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{section}.{name} = {value}: must be greater than 0")


def at_least(section: str, least: float, settings: object, *names: str) -> None:
    """Numbers, or tuples of them, of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if not all(each >= least for each in (value if isinstance(value, tuple) else (value,))):
            shown = list(value) if isinstance(value, tuple) else value
            bound = f"be at least {least:g}" if least else "not be negative"
            raise UsageError(f"{section}.{name} = {shown}: must {bound}")


def share(section: str, settings: object, *names: str) -> None:
    """0 … 1, the upper end left out."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise UsageError(f"{section}.{name} = {getattr(settings, name)}: must be at least 0 and below 1")
