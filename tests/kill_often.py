"""Kills a training at random moments, also inside the writes of its checkpoints, and looks at what is lost.

    OMP_NUM_THREADS=1 python tests/kill_often.py 50

Every other kill waits for a write to be under way (a folder whose name ends in .tmp), and falls at a random moment of
it. After each kill: the newest whole checkpoint is that of the newest save that had begun, or of the one before it, so
that a kill loses one interval at most and what was trained while a write lasted. After the last: the run ends with the
weights and the optimiser of one that nobody disturbed, bit for bit. Ends with a message and status 1 where any of that
does not hold.
"""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tiny
from processes import Command

from ldmcli.core import runs

EVERY = 40  # steps between saves


def line(out: Path, steps: int) -> list[str]:
    save = ("--save-every", EVERY, "--keep", 2, "--log-every", 1, "--sample-every", 0, "--eval-every", 0)
    save = (*save, "--set", "train.cooldown=0")  # the last part of a run would depend on its length
    own = ("train-ae", *tiny.SHAPES, *tiny.AE_NETWORK, *tiny.QUIET_LOOP, *save, "--steps", steps, "--out", out)
    return [str(part) for part in own]


def slow_writes() -> None:
    """Writes take about as long as a step or two, so that kills find them."""
    pause = runs._pause

    def slowly(point: str) -> None:
        time.sleep(0.03)
        pause(point)

    runs._pause = slowly


def state_after(out: Path) -> tuple[int, int]:
    """(step of the newest whole checkpoint, the last step in the log)."""
    newest = runs.newest_checkpoint(out)
    logged = [entry["step"] for entry in runs.read_log(out) if "lr_factor" in entry]
    return int(newest.name.removeprefix("step-")) if newest else 0, logged[-1] if logged else 0


def kill_once(folder: Path, out: Path, steps: int, attempt: int, chance: random.Random) -> tuple[int, bool]:
    """One start and its kill; (steps lost, whether a write was under way)."""
    before = state_after(out)[0]
    command = Command(folder / "log", *line(out, steps), before=slow_writes)
    target = before + chance.randrange(2 * EVERY)
    command.until(lambda: state_after_log(out) > target)
    if attempt % 2:
        command.until(lambda: bool(list((out / "checkpoints").glob(".*.tmp"))))
    time.sleep(chance.random() * 0.5)
    inside = bool(list((out / "checkpoints").glob(".*.tmp")))
    code = command.kill()
    newest, last = state_after(out)
    begun = (last - 1) // EVERY * EVERY  # a save that is due may still wait for the one before it
    if code != -9 or newest < max(before, begun - EVERY):
        raise SystemExit(f"kill {attempt}: code {code}, checkpoint {newest}, log {last}\n{command.stderr}")
    return last - newest, inside


def state_after_log(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    folder, chance = Path(tempfile.mkdtemp(prefix="kill-often-")), random.Random(0)
    steps = kills * 3 * EVERY + EVERY
    out, whole = folder / "run", folder / "whole"
    lost, inside = [], 0
    for attempt in range(kills):
        steps_lost, in_write = kill_once(folder, out, steps, attempt, chance)
        lost.append(steps_lost)
        inside += in_write
    end = (state_after(out)[0] // EVERY + 2) * EVERY
    for path in (out, whole):
        command = Command(folder / "log", *line(path, end), "--allow", "train.steps")
        if command.wait() != 0:
            raise SystemExit(command.stderr)
    same = tiny.same(tiny.weights(out), tiny.weights(whole)) and tiny.same(tiny.checkpoint(out), tiny.checkpoint(whole))
    print(
        f"{kills} kills, {inside} inside a write; a save every {EVERY} steps; lost at most {max(lost)} steps, "
        f"{sum(lost) / len(lost):.1f} on average; at step {end} {'equal' if same else 'NOT equal'} to one without kills"
    )
    shutil.rmtree(folder)
    sys.exit(not same)


if __name__ == "__main__":
    main()
