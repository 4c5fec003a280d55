"""How the C library hands memory to torch on the CPU."""

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt (malloc.h of glibc)
LARGEST = 64 * 2**20  # bytes of a block that is kept: activations of a block of pictures
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has glibc keep freed blocks of up to 64 MiB for the next tensor; whether there is a glibc to ask.

    Left alone, it returns each large block to the kernel and takes a new one for the next activation, whose pages are
    then zeroed and mapped one by one. That can take as long as the computation: `docs/experiments.md`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library, or Windows
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, NEVER))
