"""The communication between devices in a compiled program, read from its HLO text.

An HLO module is a list of computations that call each other. The body of a loop counts as often as
the loop's known trip count, or else as often as the largest constant in its condition; a loop
without either counts once, and its collectives say so. All branches of a conditional count.
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
_CALL = re.compile(r"(calls|to_apply|body|condition|branch_computations|true_computation|"
                   r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))")  # fmt: skip
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"= [su](?:32|64)\[\]\S* constant\((\d+)\)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\]")
# Three notations of replica groups: lists, an iota that is reshaped and transposed, mesh axes.
_GROUP_LISTS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_GROUP_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? ?\{([^}]*)\}"
)
_DEVICE_IOTA = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_SUB_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
# Between TPU slices the hosts carry the messages, and the replica groups are those of one slice.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


class Collective(NamedTuple):
    """All collectives of one kind and group size in a step.

    Attributes:
      kind: one of `KINDS`.
      group: number of devices in a group.
      between_slices: whether the devices of a group are in different slices.
      count: number of executions in a step.
      size: bytes per device, summed over executions: of the sum (all-reduce), of the gathered array
        (all-gather), or of the array that is scattered (reduce-scatter).
      known: whether `count` and `size` are exact; they are lower bounds if a loop of unknown trip
        count contains some of the executions, which then count once.
    """

    kind: str
    group: int
    between_slices: bool
    count: int
    size: int
    known: bool = True

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step with a ring algorithm.

        >>> Collective("all-reduce", group=8, between_slices=False, count=1, size=800).sent
        1400.0
        """
        share = (self.group - 1) / self.group
        once = 1.0 if self.kind == "collective-permute" else share
        return self.size * (2 * share if self.kind == "all-reduce" else once)


class GatheredArray(NamedTuple):
    """An array that an all-gather returns.

    Attributes:
      dtype: its dtype, as HLO names it.
      shape: its shape on one device.
      groups: [groups, devices] numbers of the devices that take part.
    """

    dtype: str
    shape: tuple[int, ...]
    groups: np.ndarray


class _Executions(NamedTuple):
    """How often a computation is executed: at least `count` times, and exactly if `known`."""

    count: int = 0
    known: bool = True


def collectives(text: str, devices: int, slices: int = 1) -> list[Collective]:
    """The communication of a program in one execution.

    Args:
      text: HLO of the compiled program (`compiled.as_text()`).
      devices: number of devices that it is compiled for, numbered slice by slice.
      slices: number of slices that the devices are in.

    Returns:
      Collectives by kind, group size and whether they cross slices, most bytes sent first.
    """
    totals: dict[tuple[str, int, bool], list] = collections.defaultdict(lambda: [0, 0, True])
    for opcode, result, line, executions in _instructions(text):
        groups, kind = _groups(line, devices, slices), opcode.removesuffix("-start")
        group_size = groups.shape[1]
        if kind != "collective-permute" and group_size == 1:
            continue
        slice_numbers = groups // (devices // slices)
        between_slices = bool((slice_numbers != slice_numbers[:, :1]).any())
        size = sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in _arrays(opcode, result))
        if kind == "reduce-scatter":
            size *= group_size
        total = totals[kind, group_size, between_slices]
        total[0] += executions.count
        total[1] += size * executions.count
        total[2] &= executions.known
    return sorted((Collective(*key, *total) for key, total in totals.items()),
                  key=lambda c: -c.sent)


def gathered_arrays(text: str, devices: int) -> list[GatheredArray]:
    """All arrays that the all-gathers of a program return.

    Args:
      text: HLO of the compiled program.
      devices: number of devices, all in one slice, that it is compiled for.
    """
    return [
        GatheredArray(dtype, shape, _groups(line, devices, 1))
        for opcode, result, line, _ in _instructions(text)
        for dtype, shape in _arrays(opcode, result) if opcode.startswith("all-gather")
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
    """The trip count of a loop; None if neither the loop nor its condition has one."""
    known = _TRIP_COUNT.search(line)
    if known:
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], ()) if condition else ()
    constants = [_CONSTANT.search(other) for other in lines]
    return max((int(constant[1]) for constant in constants if constant), default=None)


def _executions(computations: dict[str, list[str]], entry: str) -> dict[str, _Executions]:
    """How often each computation is executed, by name."""
    executions: dict[str, _Executions] = collections.defaultdict(_Executions)

    def visit(name: str, count: int, known: bool) -> None:
        before = executions[name]
        executions[name] = _Executions(before.count + count, before.known and known)
        for line in computations.get(name, ()):
            for role, names, single_name in _CALL.findall(line):
                trips = _trip_count(line, computations) if role in ("body", "condition") else 1
                for callee in re.findall(r"[\w.\-]+", names or single_name):
                    if callee in computations:
                        calls = count * (1 if trips is None else trips)
                        visit(callee, calls, known and trips is not None)

    visit(entry, 1, True)
    return executions


def _instructions(text: str) -> Iterator[tuple[str, str, str, _Executions]]:
    """(opcode, type of the result, line, executions) of each collective."""
    computations, entry = _computations(text)
    executions = _executions(computations, entry)
    for name, lines in computations.items():
        for line in lines:
            instruction = _INSTRUCTION.match(line)
            if not instruction or not executions[name].count:
                continue
            result, opcode = instruction.groups()
            transfer = _BETWEEN_SLICES.search(line) if opcode == "send" else None
            if transfer:
                opcode = transfer[1].lower().replace("_", "-")
            if opcode.removesuffix("-start") in KINDS:
                yield opcode, result, line, executions[name]


def _arrays(opcode: str, result: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtypes and shapes of the arrays that a collective returns."""
    if result.startswith("(("):
        result = _after_inputs(result)
    shapes = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(result) if dtype in _BYTES
    ]
    if opcode in ("all-gather-start", "collective-permute-start") and result.startswith("("):
        # The result lists the inputs, then the outputs, then scalars of the runtime.
        arrays = [shape for shape in shapes if shape[1] or len(shapes) <= 2]
        shapes = arrays[len(arrays) // 2 :]
    return shapes[:1] if "token[]" in result else shapes


def _after_inputs(result: str) -> str:
    """The outputs in ((inputs), outputs, u32[] of the runtime), as GPU programs start any kind of
    collective."""
    depth = 0
    for place, sign in enumerate(result[1:], 1):
        depth += (sign == "(") - (sign == ")")
        if depth == 0:
            return result[place + 1 :].replace("u32[]", "")
    return result


def _groups(line: str, devices: int, slices: int) -> np.ndarray:
    """[groups, devices] numbers of the devices that take part in a collective."""
    if _BETWEEN_SLICES.search(line):
        return np.arange(devices).reshape(slices, -1).T
    iota = _GROUP_IOTA.search(line)
    if iota:
        return _iota_groups(*iota.groups())
    mesh = _GROUP_MESH.search(line)
    if mesh:
        return _mesh_groups(*mesh.groups())
    lists = _GROUP_LISTS.search(line) or _PAIRS.search(line)
    if not lists:
        return np.arange(devices)[None]
    return np.array([_integers(group) for group in re.findall(r"\{([\d,]+)\}", lists[1])])


def _iota_groups(groups: str, members: str, sizes: str, axes: str | None) -> np.ndarray:
    """The groups of, for example, [4,2]<=[2,4]T(1,0)."""
    return _iota(sizes, axes).reshape(int(groups), int(members))


def _iota(sizes: str, axes: str | None) -> np.ndarray:
    """The numbers from 0 in a shape, transposed if axes are given."""
    shape = _integers(sizes)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(_integers(axes)) if axes else numbers


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> np.ndarray:
    """The groups of, for example, mesh['a'=2,'b'=4] {'a','b':(2)2}: all devices along the named
    axes; of "b" along the inner 2 only, which an outer 2 precedes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    places = np.arange(math.prod(sizes.values()))
    first = places.copy()
    for name, outer, part in _SUB_AXIS.findall(axes):
        after = math.prod(list(sizes.values())[list(sizes).index(name) + 1 :])
        outer, part = int(outer or 1), int(part or sizes[name])
        stride = after * sizes[name] // (outer * part)
        first -= places // stride % part * stride
    groups = np.argsort(first, kind="stable").reshape(len(np.unique(first)), -1)
    return _device_numbers(device_ids)[groups] if device_ids else groups


def _device_numbers(device_ids: str) -> np.ndarray:
    """The devices of a mesh in order: a list, or for example [4,2]T(1,0)."""
    iota = _DEVICE_IOTA.match(device_ids)
    return _iota(*iota.groups()).reshape(-1) if iota else np.array(_integers(device_ids))


def _integers(text: str) -> list[int]:
    """The integers of a comma-separated list."""
    return [int(n) for n in text.split(",")]
