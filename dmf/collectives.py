"""What a compiled program sends between devices, read from its text.

XLA writes a program as computations that call each other. A loop's body runs as often as the loop
says it is known to, or else up to the number that its condition compares with; where there is no
such number it counts once, and what it sends says so. A branch counts as taken.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.+?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(calls|to_apply|body|condition|branch_computations|true_computation|"
                     r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
# Between slices of TPUs the hosts carry what is sent; groups are then those of one slice.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


class Collective(NamedTuple):
    """One kind of message among one size of group, summed over a step.

    Attributes:
      kind: one of `KINDS`.
      group: how many devices take part.
      between_slices: whether they lie in more than one slice.
      count: how often in a step.
      size: bytes that a device holds of it, whole: of the sum, of what was gathered, or of what is
        scattered.
      known: whether that is all; False where some of it lies in a loop that does not say how often
        it runs, and counts once.
    """

    kind: str
    group: int
    between_slices: bool
    count: int
    size: int
    known: bool = True

    @property
    def sent(self) -> float:
        """Bytes that a device sends at least, as in a ring."""
        share = (self.group - 1) / self.group
        once = 1.0 if self.kind == "collective-permute" else share
        return self.size * (2 * share if self.kind == "all-reduce" else once)


class Result(NamedTuple):
    """One array that a collective gives, and [groups, members] of the devices that take part."""

    dtype: str
    shape: tuple[int, ...]
    groups: np.ndarray


class _Runs(NamedTuple):
    """How often a computation runs, at least; and whether no loop around it leaves that open."""

    times: int = 0
    known: bool = True


def _parsed(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return found, entry


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a loop runs; None where neither it nor its condition says."""
    told = _TRIPS.search(line)
    if told:
        return int(told[1])
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], ()) if condition else ()
    limits = [_LIMIT.search(other) for other in lines]
    return max((int(limit[1]) for limit in limits if limit), default=None)


def _runs(computations: dict[str, list[str]], entry: str) -> dict[str, _Runs]:
    """How often each computation runs."""
    runs: dict[str, _Runs] = collections.defaultdict(_Runs)

    def visit(name: str, times: int, known: bool) -> None:
        runs[name] = _Runs(runs[name].times + times, runs[name].known and known)
        for line in computations.get(name, ()):
            for how, several, one in _CALLED.findall(line):
                more = _trips(line, computations) if how in ("body", "condition") else 1
                for called in re.findall(r"[\w.\-]+", several or one):
                    if called in computations:
                        often = times * (1 if more is None else more)
                        visit(called, often, known and more is not None)

    visit(entry, 1, True)
    return runs


def _instructions(text: str) -> Iterator[tuple[str, str, str, _Runs]]:
    """(kind, type of the result, line, runs) of each collective."""
    computations, entry = _parsed(text)
    runs = _runs(computations, entry)
    for name, lines in computations.items():
        for line in lines:
            made = _INSTRUCTION.match(line)
            if not made or not runs[name].times:
                continue
            between = _BETWEEN_SLICES.search(line) if made[2] == "send" else None
            kind = between[1].lower().replace("_", "-") if between else made[2]
            if kind.removesuffix("-start") in KINDS:
                yield kind, made[1], line, runs[name]


def _arrays(opcode: str, result: str) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of what a collective gives."""
    shapes = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(result) if dtype in _BYTES
    ]
    if opcode in ("all-gather-start", "collective-permute-start") and result.startswith("("):
        # What goes in stands before what comes out, and scalars of the runtime after it.
        arrays = [shape for shape in shapes if shape[1] or len(shapes) <= 2]
        shapes = arrays[len(arrays) // 2 :]
    return shapes[:1] if "token[]" in result else shapes


def _groups(line: str, devices: int, slices: int) -> np.ndarray:
    """[groups, members] of device numbers."""
    if _BETWEEN_SLICES.search(line):
        return np.arange(devices).reshape(slices, -1).T
    iota = _IOTA.search(line)
    if iota:
        sizes = [int(n) for n in iota[3].split(",")]
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[4]:
            numbers = numbers.transpose([int(n) for n in iota[4].split(",")])
        return numbers.reshape(int(iota[1]), int(iota[2]))
    mesh = _MESH.search(line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        along = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", mesh[2])]
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = range(numbers.ndim - len(along), numbers.ndim)
        return np.moveaxis(numbers, along, last).reshape(
            -1, math.prod(numbers.shape[axis] for axis in along)
        )
    listed = _LISTED.search(line) or _PAIRS.search(line)
    if not listed:
        return np.arange(devices)[None]
    return np.array([[int(n) for n in group.split(",")]
                     for group in re.findall(r"\{([\d,]+)\}", listed[1])])


def collectives(text: str, devices: int, slices: int = 1) -> list[Collective]:
    """What a program sends in one run, the largest first.

    Args:
      text: of the compiled program (`compiled.as_text()`).
      devices: how many it is compiled for, numbered slice by slice.
      slices: how many slices they lie in, which a mesh may cut further.
    """
    total: dict[tuple[str, int, bool], list] = collections.defaultdict(lambda: [0, 0, True])
    for opcode, result, line, runs in _instructions(text):
        groups, kind = _groups(line, devices, slices), opcode.removesuffix("-start")
        places = groups // (devices // slices)
        size = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in _arrays(opcode, result))
        if kind == "reduce-scatter":
            size *= groups.shape[1]
        if kind != "collective-permute" and groups.shape[1] == 1:
            continue
        entry = total[kind, groups.shape[1], bool((places != places[:, :1]).any())]
        entry[0] += runs.times
        entry[1] += size * runs.times
        entry[2] &= runs.known
    found = [Collective(*key, *entry) for key, entry in total.items()]
    return sorted(found, key=lambda c: -c.sent)


def gathered(text: str, devices: int) -> list[Result]:
    """Every array that an all-gather of a program for so many devices of a slice gives."""
    return [
        Result(dtype, shape, _groups(line, devices, 1))
        for opcode, result, line, _ in _instructions(text)
        for dtype, shape in _arrays(opcode, result) if opcode.startswith("all-gather")
    ]
