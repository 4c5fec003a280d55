"""A machine that reads pickles of checkpoints without executing them.

A pickle is a program. This machine knows lists, dicts, numbers, text and the few functions that rebuild tensors; it
imports nothing and calls nothing by name. Classes that training libraries leave in checkpoints become inert stand-ins;
every other name is refused.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_OPCODES, MAX_STACK, MAX_MARKS, MAX_TUPLES = 500_000, 200_000, 1_000, 50


_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}


# packages whose classes are found in checkpoints beside the weights; nothing of them is ever called
_INERT = frozenset(
    """
    torch numpy collections pytorch_lightning lightning lightning_fabric omegaconf argparse ldm taming main
    torchmetrics typing pathlib datetime enum _codecs copyreg copy_reg
    """.split()
)


_INERT_BUILTINS = frozenset(
    """
    int float complex bool str bytes bytearray list dict tuple set frozenset slice range object type unicode long
    """.split()
)


class Refused(Exception):
    """Why a pickle is not read further: the end of a sentence about the file."""


@dataclass(frozen=True)
class Name:
    """A class or function that the pickle names; only a name."""

    path: str


@dataclass(frozen=True, eq=False)
class Inert:
    """What stands for an object of a class that is not ours."""

    path: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file, by its key."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not made yet: a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Machine:
    """Runs one pickle from a file's position to its STOP. Keys of dicts are plain values: hashing never goes deep."""

    def __init__(self, file: Any):
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.depths: dict[int, tuple[int, tuple]] = {}  # of tuples in tuples, which are kept so that ids stay theirs

    def run(self) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if count > MAX_OPCODES or len(self.stack) > MAX_STACK or len(self.marks) > MAX_MARKS:
                raise Refused("refused: its pickle is too long or nests too deeply for a checkpoint")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _PLAIN:
                self.stack.append(argument)
            else:
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise Refused(f"refused: its pickle uses {opcode.name}, which no checkpoint needs")
                step(self, argument)
        raise Refused("is cut short")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def tuple_of(self, items: list[Any]) -> None:
        made = tuple(items)
        inner = [self.depths.get(id(item), (1, ()))[0] for item in made if isinstance(item, tuple)]
        if inner:
            self.depths[id(made)] = 1 + max(inner), made
            if max(inner) > MAX_TUPLES:
                raise Refused("refused: its pickle nests too deeply for a checkpoint")
        self.stack.append(made)

    def put(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int, float, bytes, bool, Name, Inert, type(None))):
                raise Refused("refused: a dictionary's key is no plain value")
            if isinstance(target, dict):
                target[key] = value

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def named(self, module: str, name: str) -> Name:
        path = f"{module}.{name}"
        top = module.partition(".")[0]
        builtin = module in ("builtins", "__builtin__") and name in _INERT_BUILTINS
        if not builtin and (top not in _INERT or not name.replace(".", "").isidentifier()):
            raise Refused(f"refused: it wants to call {path[:80]}, which is no part of a model; nothing was executed")
        return Name(path)

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            return Inert(getattr(function, "path", "?"))
        rebuild = _REBUILD.get(function.path)
        return Inert(function.path) if rebuild is None else rebuild(*arguments)

    def persistent(self, given: Any) -> Storage:
        kind, storage_type, key, _, count, *view = given
        if kind != "storage" or any(part is not None for part in view) or not isinstance(storage_type, Name):
            raise Refused("refused: it refers to something other than a storage of numbers")
        dtype = _STORAGES.get(storage_type.path)
        if dtype is None:
            raise Refused(f"holds numbers of type {storage_type.path}, which no model here has")
        if not isinstance(count, int) or count < 0:
            raise ValueError("a storage of negative size")
        storage = Storage(str(key), dtype, count)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Refused(f"describes storage {storage.key} in two ways")
        return storage


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Lazy:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    if len(size) != len(stride) or len(size) > 8 or not all(isinstance(n, int) and n >= 0 for n in (*size, *stride)):
        raise ValueError("a tensor of impossible size")
    if not isinstance(offset, int) or offset < 0:
        raise ValueError("a tensor that begins before its storage")
    count = 1
    for n in size:
        count *= n
    end = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if count else 0
    if count > storage.count or end > storage.count:
        raise ValueError("a tensor larger than its storage")
    return Lazy(storage, offset, tuple(size), tuple(stride))


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": lambda values=(): tuple(values),
    "collections.OrderedDict": lambda *_: {},
    "builtins.dict": lambda *_: {},
    "builtins.list": lambda *_: [],
}


_PLAIN = frozenset(
    """
    NONE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES
    SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BYTEARRAY8
    """.split()
)


def _pairs(items: list[Any]) -> dict:
    made = Machine(None)
    made.stack.append({})
    made.put(items)
    return made.stack[0]


def _memoize(machine: Machine, index: int | None = None) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _global(machine: Machine, argument: str) -> None:
    machine.stack.append(machine.named(*argument.split(" ", 1)))


def _stack_global(machine: Machine, _: Any) -> None:
    module, name = machine.last(2)
    machine.stack.append(machine.named(str(module), str(name)))


def _reduce(machine: Machine, _: Any) -> None:
    machine.stack.append(machine.call(*machine.last(2)))


def _object(machine: Machine, items: list[Any]) -> None:
    machine.stack.append(machine.call(items[0], tuple(items[1:])))


def _push(make: Callable[[Machine], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make(machine))


_STEPS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.last(1),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": _push(lambda m: m.stack[-1]),
    "NEWTRUE": _push(lambda m: True),
    "NEWFALSE": _push(lambda m: False),
    "EMPTY_LIST": _push(lambda m: []),
    "EMPTY_DICT": _push(lambda m: {}),
    "EMPTY_TUPLE": _push(lambda m: ()),
    "EMPTY_SET": _push(lambda m: []),
    "LIST": _push(lambda m: m.since_mark()),
    "TUPLE": lambda m, _: m.tuple_of(m.since_mark()),
    "FROZENSET": _push(lambda m: m.since_mark()),
    "DICT": _push(lambda m: _pairs(m.since_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(m.last(1)),
    "TUPLE2": lambda m, _: m.tuple_of(m.last(2)),
    "TUPLE3": lambda m, _: m.tuple_of(m.last(3)),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.put(m.last(2)),
    "SETITEMS": lambda m, _: m.put(m.since_mark()),
    "BUILD": lambda m, _: m.last(1),  # the state of an object that is none here
    "MEMOIZE": lambda m, _: _memoize(m),
    "PUT": _memoize,
    "BINPUT": _memoize,
    "LONG_BINPUT": _memoize,
    "GET": lambda m, index: m.stack.append(m.memo[index]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": lambda m, name: m.stack.append(m.call(m.named(*name.split(" ", 1)), tuple(m.since_mark()))),
    "OBJ": lambda m, _: _object(m, m.since_mark()),
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": lambda m, _: _object(m, m.last(3)[:1]),
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.last(1)[0])),
}
