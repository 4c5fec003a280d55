"""Commands that use a model: several processes share their work, as --gpus or a launcher of the user's own says."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from ldmcli.cli.parsing import ParsedOptions
from ldmcli.core import launch
from ldmcli.core.world import joined

if TYPE_CHECKING:
    from ldmcli.sampling.machine import Machine


def shared(given: ParsedOptions, work: Callable[["Machine"], None]) -> None:
    """Calls `work` on each of the processes of the command, with what --gpus, --mixed-precision and --compile say."""
    code = launch.relaunch_if_needed(given.gpus, given.argv)
    if code is not None:
        raise typer.Exit(code)
    from ldmcli.sampling.machine import Machine, leave_taken_cores

    with joined() as world:
        leave_taken_cores(world)
        work(Machine(world, given.mixed_precision or "auto", bool(given.compile)))
