"""What the machine code of a kernel tells: registers, spills, and the instructions of its loop."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dmf.errors import RunError

# Wheels that hold NVIDIA's tools, by the package that is imported and the folder in it.
TOOL_FOLDERS = (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin"))
TOOLS = {"cuobjdump": "-res-usage", "nvdisasm": "-c"}
TOOL_WHEELS = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"^(\.L_x_\d+):")
JUMP = re.compile(r"BRA(?:\.\w+)*\s.*\((\.L_x_\d+)\)")
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# Ampere's tensor instructions by the digits of their shape: 16 x 8 x 16 and 16 x 8 x 8.
WARP_SHAPES = {"16816": 2 * 16 * 8 * 16, "1688": 2 * 16 * 8 * 8}
SPILLS = ("LDL", "STL")


class Resources(NamedTuple):
    """What a kernel takes: registers of a thread, and bytes of stack and of static shared memory
    (local memory is on the stack)."""

    registers: int
    stack: int
    shared_memory: int


class Work(NamedTuple):
    """What a warp does in a stretch of code: instructions, and FLOPs on tensor cores."""

    instructions: int
    flops: int


class MachineCode(NamedTuple):
    """The instructions of a kernel.

    Attributes:
      tensor: how often each tensor instruction occurs, such as "HGMMA.64x64x16".
      spills: instructions that read or write registers kept in local memory.
      loop: what one pass through the loop over the keys does; nothing if there is no loop.
      rest: what the code around it does.
    """

    tensor: dict[str, int]
    spills: int
    loop: Work
    rest: Work


def tool(name: str) -> str:
    """The path of one of NVIDIA's tools, on the PATH or in a wheel.

    Raises:
      RunError: it is not installed; the message says what to install.
    """
    for path in paths_of(name):
        return path
    raise RunError(f"{name} is not installed: pip install {' '.join(TOOL_WHEELS)}")


def paths_of(name: str) -> Iterator[str]:
    """Where a tool is."""
    if path := shutil.which(name):
        yield path
    for package, folder in TOOL_FOLDERS:
        for root in _folders_of(package):
            if (path := Path(root) / folder / name).exists():
                yield str(path)


def _folders_of(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []


def read(name: str, cubin: bytes) -> tuple[Resources, MachineCode]:
    """Resources and instructions of a kernel in an ELF file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (
            subprocess.run([tool(program), option, file.name], capture_output=True, text=True,
                           check=True).stdout
            for program, option in TOOLS.items()
        )  # fmt: skip
    return parse_resources(name, resources), parse_code(name, code)


def parse_resources(kernel: str, text: str) -> Resources:
    """The resources of a kernel that `cuobjdump -res-usage` lists."""
    listed = {name: numbers for name, *numbers in RESOURCES.findall(text)}
    registers, stack, shared, local = listed[kernel]
    return Resources(int(registers), int(stack) + int(local), int(shared))


def parse_code(kernel: str, text: str) -> MachineCode:
    """The instructions of a kernel that `nvdisasm -c` lists, with the loop that holds the most
    FLOPs."""
    text = text.partition(f"\n.text.{kernel}:")[2].partition("\n//----")[0]
    instructions, labels, jumps = [], {}, []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.search(line):
            instructions.append(instruction[1])
            if jump := JUMP.search(line):
                jumps.append((jump[1], len(instructions)))
    whole = _work(instructions)
    # A loop is what lies between a label and a later jump to it.
    loops = [_work(instructions[labels[name] : end]) for name, end in jumps
             if labels.get(name, end) < end - 1]  # fmt: skip
    loop = max(loops, key=lambda work: (work.flops, -work.instructions), default=Work(0, 0))
    if not loop.flops:
        loop = Work(0, 0)
    rest = Work(*(a - b for a, b in zip(whole, loop, strict=True)))
    return MachineCode(
        tensor=_count([_tensor_name(name) for name in instructions if _flops(name)]),
        spills=sum(name.split(".")[0] in SPILLS for name in instructions),
        loop=loop,
        rest=rest,
    )


def _work(instructions: list[str]) -> Work:
    # A kernel ends with a jump to itself and padding, which never run.
    running = [name for name in instructions if name != "NOP"]
    return Work(len(running), sum(map(_flops, running)))


def _flops(instruction: str) -> int:
    """FLOPs of a warp in a tensor instruction: a quarter of those of its group of four warps
    (HGMMA, Hopper) or all (HMMA); 0 for others."""
    name, _, rest = instruction.partition(".")
    shape = rest.partition(".")[0]
    if name == "HGMMA":
        m, n, k = map(int, shape.split("x"))
        return 2 * m * n * k // 4
    return WARP_SHAPES[shape] if name == "HMMA" else 0


def _tensor_name(instruction: str) -> str:
    return ".".join(instruction.split(".")[:2])


def _count(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}
