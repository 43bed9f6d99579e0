"""The machine code of the kernel for GPUs: how it is read, and that it spills nothing."""

import importlib.util

import pytest

from benchmarks.gpu_kernels import executable, machine_code
from benchmarks.gpu_kernels import floors as gpu_floors
from benchmarks.gpu_kernels.executable import ELF, RIEGELI_BLOCK, RIEGELI_SIGNATURE, Kernel
from benchmarks.gpu_kernels.machine_code import MachineCode, Resources, Work
from benchmarks.gpu_kernels.readings import read, row
from dmf.errors import RunError
from dmf.runtime.gpu_topologies import GPU_CHIPS

CODE = """
.text.helper:
        /*0000*/                   HMMA.16816.F32 R0, R4, R6, R0 ;
        /*0010*/                   RET.ABS.NODEC R20 0x0 ;
.L_x_5:

//--------------------- .text.attention          --------------------------
        .section        .text.attention,"ax",@progbits
attention:
.text.attention:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R8 ;
.L_x_0:
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R40, gdesc[UR32], RZ, !UPT ;
        /*0030*/              @!P0 FADD R2, R2.reuse, R3 ;
.L_x_1:
        /*0040*/                   HMMA.1688.F32.TF32 R0, R4, R6, R0 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   LDL.64 R8, [R1] ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function helper:
  REG:24 STACK:0 SHARED:0 LOCAL:0 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function attention:
  REG:255 STACK:24 SHARED:1024 LOCAL:8 CONSTANT[0]:416 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def message(*fields) -> bytes:
    """A message of (number, integer or bytes)."""
    return b"".join(
        varint(number << 3) + varint(value) if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )  # fmt: skip


def snapped(data: bytes) -> bytes:
    """A block of Snappy of literals, with the size in front as Riegeli has it."""
    pieces = [data[i : i + 2**16] for i in range(0, len(data), 2**16)]
    literals = [bytes([61 << 2]) + (len(x) - 1).to_bytes(2, "little") + x for x in pieces]
    return varint(len(data)) * 2 + b"".join(literals)


def riegeli(*records: bytes, compression: bytes) -> bytes:
    """A Riegeli file of one chunk."""
    compress = snapped if compression == b"s" else bytes
    sizes = compress(b"".join(varint(len(record)) for record in records))
    data = compression + varint(len(sizes)) + sizes + compress(b"".join(records))
    chunks = b"".join(
        bytes(8) + len(part).to_bytes(8, "little") + bytes(8) + kind + bytes(15) + part
        for kind, part in ((b"s", b""), (b"r", data))
    )
    size = RIEGELI_BLOCK - 24
    blocks = [chunks[i : i + size] for i in range(0, len(chunks), size)]
    headers = [RIEGELI_SIGNATURE + bytes(8), *[b"\xff" * 24] * (len(blocks) - 1)]
    return b"".join(header + block for header, block in zip(headers, blocks, strict=True))


@pytest.mark.parametrize("compression", [b"s", b"\0"])
def test_a_kernel_is_found_in_an_executable(compression):
    cubin = ELF + bytes(range(256)) * 600
    launch = message((1, b"attention"), (2, message((2, message((1, cubin))), (3, 8))),
                     (3, message((2, message((1, 4), (2, 16), (3, 32))))),
                     (4, message((1, message((1, 128), (2, 1), (3, 1))))), (6, 1000))  # fmt: skip
    record = message((1, b"text"), (13, message((4, 1), (1, message((3, launch))))))
    first = riegeli(b"options", compression=compression)
    stored = b"front" + first + riegeli(b"header", b"", record, compression=compression)
    assert executable.kernels(stored) == [Kernel("attention", cubin, 2048, 128, 1000)]


def test_an_executable_without_a_kernel_is_told():
    with pytest.raises(RunError, match="no GPU kernel was found"):
        executable.kernels(riegeli(message((1, b"text")), compression=b"s"))


def test_snappy_repeats_what_it_wrote():
    """A literal, copies whose offset takes one byte and two, and one that repeats itself."""
    copies = bytes([4 << 2 | 1, 3, 2 << 2 | 2, 10, 0])
    block = bytes([17, 2 << 2]) + b"abc" + copies + bytes([2 << 2]) + b"xyz"
    assert executable.unsnap(block) == b"abc" + b"abcabcab" + b"bca" + b"xyz"


def test_the_instructions_of_a_kernel_and_of_its_loop_are_counted():
    code = machine_code.parse_code("attention", CODE)
    inner, outer = 2 * 16 * 8 * 8, 2 * 64 * 16 * 16 // 4
    assert code == MachineCode(
        tensor={"HGMMA.64x16x16": 1, "HMMA.1688": 1}, spills=2,
        loop=Work(6, inner + outer), rest=Work(4, 0),
    )  # fmt: skip
    straight = CODE.replace("BRA `(.L_x_0)", "FADD R2").replace("BRA `(.L_x_1)", "FADD R2")
    assert machine_code.parse_code("attention", straight).loop == Work(0, 0)
    assert machine_code.parse_code("helper", CODE).rest == Work(2, 2 * 16 * 8 * 16)


def test_the_resources_are_those_of_the_kernel():
    assert machine_code.parse_resources("attention", RESOURCES) == Resources(255, 32, 1024)


def test_a_missing_tool_is_named_with_its_wheel(monkeypatch):
    monkeypatch.setattr(machine_code.shutil, "which", lambda _: None)
    monkeypatch.setattr(machine_code, "_folders_of", lambda _: [])
    with pytest.raises(RunError, match="^nvdisasm is not installed: pip install .*nvdisasm"):
        machine_code.tool("nvdisasm")


@pytest.mark.parametrize(
    ("gpu", "threads", "registers", "shared_memory", "warps"),
    [
        ("h100", 128, 168, 0, 12),  # 3 warps of 5,376 registers on each scheduler
        ("h100", 128, 169, 0, 8),  # 2 of 5,632
        ("h100", 256, 255, 0, 8),
        ("h100", 128, 32, 0, 64),
        ("h100", 32, 32, 0, 32),  # at most 32 blocks
        ("h100", 128, 32, 100 * 2**10, 8),  # 2 blocks of 101 KiB in 228
        ("a100", 128, 32, 100 * 2**10, 4),  # 1 in 164
    ],
)
def test_warps_that_a_multiprocessor_holds(gpu, threads, registers, shared_memory, warps):
    kernel = Kernel("", b"", 1, threads, shared_memory)
    resources = Resources(registers, 0, 0)
    assert gpu_floors.resident_warps(GPU_CHIPS[gpu], kernel, resources) == warps


def test_the_floor_follows_from_bytes_flops_and_instructions():
    kernel = Kernel("", b"", blocks=132 * 4, threads=128, shared_memory=0)
    code = MachineCode({}, 0, loop=Work(100, 4096), rest=Work(10, 96))
    floor = gpu_floors.floor(GPU_CHIPS["h100"], kernel, code, passes=3, moved=3.352e9)
    assert floor.memory == pytest.approx(1e-3)
    # 4 blocks of 4 warps on each multiprocessor, and 4 schedulers: 4 x 310 cycles of 1.83 GHz.
    assert floor.issue == pytest.approx(4 * 310 / 1.83e9, rel=1e-3)
    assert floor.tensor == pytest.approx(132 * 16 * (3 * 4096 + 96) / 989e12, rel=1e-3)


needs_tools = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None
    or not all(any(machine_code.paths_of(name)) for name in machine_code.TOOLS),
    reason="needs JAX for CUDA and NVIDIA's tools (pip install 'jax[cuda13]' "
    + " ".join(machine_code.TOOL_WHEELS) + ")",
)  # fmt: skip


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize("width", [32, 64, 72, 80, 96, 112, 128])
@pytest.mark.parametrize("length", [64, 256])
def test_the_kernel_spills_nothing_and_pads_widths_to_16(gpu, width, length):
    reading = read(gpu, 2, length, 4, width)
    assert reading.code.spills == reading.resources.stack == 0
    assert reading.warps >= 8
    assert reading.flops_ratio == pytest.approx(-(-width // 16) * 16 / width)
    assert row(gpu, length, width, reading).count("|") == 15
