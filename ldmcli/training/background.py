"""Work beside the training loop: a copy of tensors that the loop goes on changing, and a thread that writes it."""

import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ldmcli.training.sharding import whole

SLAB = 256 << 20  # bytes; a power of two, because pinned memory is given out in those
_ALIGNED = 64

Groups = dict[str, dict[str, Tensor]]


def bytes_of(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for group in groups.values() for tensor in group.values())


class HostCopy:
    """A copy of tensors in the host's memory, in the same memory each time. pinned: so that a GPU copies at full speed
    and all at once."""

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self._slabs: list[Tensor] = []

    @property
    def held(self) -> int:
        """Bytes that it takes."""
        return sum(len(slab) for slab in self._slabs)

    @torch.no_grad()
    def take(self, groups: Groups) -> Groups:
        """The tensors as they are now, on the CPU, contiguous and whole; the copy before is overwritten. Returns when
        all are there. Collective where tensors are cut."""
        out: Groups = {name: {} for name in groups}
        for name, key, tensor, room in self._rooms(groups):
            out[name][key] = room.view(tensor.dtype).view(tensor.shape).copy_(whole(tensor), non_blocking=self.pinned)
        if self.pinned:
            torch.cuda.synchronize()
        return out

    def reserve(self, groups: Groups) -> None:
        """Takes the memory that a copy of these tensors needs: the system gives it out page by page, which is slower
        than the copy itself."""
        for *_, room in self._rooms(groups):
            room.zero_()

    def _rooms(self, groups: Groups) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(group, name, tensor, its bytes in a slab), one behind the other."""
        slab, start = 0, 0
        for name, group in groups.items():
            for key, tensor in group.items():
                size = tensor.numel() * tensor.element_size()
                if start + size > (len(self._slabs[slab]) if slab < len(self._slabs) else SLAB):
                    slab, start = slab + (start > 0), 0
                yield name, key, tensor, self._slab(slab, size)[start : start + size]
                start += -(-size // _ALIGNED) * _ALIGNED

    def _slab(self, place: int, size: int) -> Tensor:
        """The slab at a place, of `size` bytes at least."""
        if place == len(self._slabs):
            self._slabs.append(torch.empty(0, dtype=torch.uint8))
        if len(self._slabs[place]) < size or not len(self._slabs[place]):
            self._slabs[place] = self._memory(max(SLAB, size))
        return self._slabs[place]

    def _memory(self, size: int) -> Tensor:
        if self.pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the system pins no more
                pass
        return torch.empty(size, dtype=torch.uint8)


class GivenUp(Exception):
    """The work was asked to end."""


class Background:
    """At most one piece of work at a time in a thread; its error is raised by the `wait` that follows."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Begins, after `wait`."""
        self.wait()
        # a daemon: the interpreter of a command that ends at once does not wait for it
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Returns when nothing is under way. Raises what the work raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def check(self) -> None:
        """For the work itself: raises GivenUp where `give_up` was called."""
        if self._given_up.is_set():
            raise GivenUp

    def give_up(self) -> None:
        """Asks the work to end soon, and waits for that; its error is forgotten."""
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()
        self._thread = self._error = None
