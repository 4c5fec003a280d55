"""What a picture costs in a feature network, with freed memory kept and with glibc's own rule, in turns.

    python docs/measure/features_speed.py --features effnet-lite0

Each turn is a process of its own. Printed: seconds of the user and of the system a picture of 64 px, and pages mapped.
"""

import argparse
import resource
import subprocess
import sys

import numpy as np

PICTURES, BLOCKS = 8, 6


def measure(network: str, kept: bool) -> None:
    """Prints a turn."""
    from ldmcli.core.allocator import keep_freed_memory
    from ldmcli.evaluation.extractors import open_extractor

    if kept:
        keep_freed_memory()
    extractor = open_extractor(network)
    pictures = list(np.random.default_rng(0).integers(0, 256, (PICTURES, 64, 64, 3), dtype=np.uint8))
    extractor.features(pictures)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(BLOCKS):
        extractor.features(pictures)
    after = resource.getrusage(resource.RUSAGE_SELF)
    count = PICTURES * BLOCKS
    user, system = (after.ru_utime - before.ru_utime) / count, (after.ru_stime - before.ru_stime) / count
    pages = after.ru_minflt - before.ru_minflt
    print(f"{'kept' if kept else 'own rule':9} user {user:.4f} s  system {system:.4f} s  pages {pages:,}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--features", default="effnet-lite0")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--turn", choices=["kept", "own"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.turn:
        measure(given.features, given.turn == "kept")
    else:
        for turn in ["own", "kept"] * given.turns:
            subprocess.run([sys.executable, __file__, "--features", given.features, "--turn", turn], check=True)
