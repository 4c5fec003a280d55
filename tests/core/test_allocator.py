"""Memory that torch frees is used again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from ldmcli.core.allocator import keep_freed_memory
asked = sys.argv[1] == "asked" and keep_freed_memory()
for size in (10, 40):
    torch.ones(size * 2**18)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in (10, 20, 40, 30) * 25:
    torch.ones(size * 2**18)
print(int(asked), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(word: str) -> tuple[int, int]:
    """(whether glibc was asked, pages mapped while 100 tensors of 10 to 40 MB came and went)."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True)
    asked, faults = map(int, done.stdout.split())
    return asked, faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_blocks_are_taken_again():
    (plain, many), (asked, few) = page_faults("plain"), page_faults("asked")
    assert (plain, asked) == (0, 1)
    assert few < many / 5 and many > 10_000
