"""Settings with which full-size runs fit into TPUs and GPUs, compiled ahead of time without them.

    python -m benchmarks.scaling --output=benchmarks/results/scaling.md
    python -m benchmarks.scaling --devices=gpu --output=benchmarks/results/scaling_gpu.md

Each config is compiled with more and more rematerialisation, then with more and more gradient
accumulation, until it fits; a few further cases follow. Results are stored beside the table and not
compiled again. The memory of a chip is that of `dmf.runtime.device_specs`.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks.machine import machine, start
from dmf.runtime import gpu_topologies
from dmf.runtime.device_specs import GIB, program_memory
from dmf.training.hlo_collectives import Collective

_DEVICES = flags.DEFINE_enum("devices", "tpu", ("tpu", "gpu"), "devices to compile for")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/scaling.md",
                              "a .md file for the table; results go into a .json file beside it")


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      topology: for example "v5e:4x4", "2 x v5e:4x4" for several slices, or "h100:4x8".
      config: name of the config file, with its row as in "improved_meanflow:xl2".
      batch: global batch size.
      settings: fields of the config by dotted name.
    """

    topology: str
    config: str
    batch: int
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Key of its result in the .json file."""
        return json.dumps(self)

    @property
    def slices(self) -> tuple[int, str]:
        """Number of slices, and the topology of one."""
        count, _, name = self.topology.rpartition(" x ")
        return int(count or 1), name

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        count, name = self.slices
        return count * math.prod(int(side) for side in name.partition(":")[2].split("x"))

    @property
    def mesh(self) -> str:
        """The mesh in the table."""
        slices, name = self.slices
        if name.partition(":")[0] in gpu_topologies.GPU_CHIPS:
            slices = gpu_topologies.parse(name).nodes
        slices = self.settings.get("mesh.slices", slices)
        return f"slices {slices} x " * (slices > 1) + f"data {self.chips // slices}"


TOPOLOGIES = {"v5e:4x4": "TPU v5 lite", "v6e:4x4": "TPU v6 lite", "v5p:2x2x1": "TPU v5",
              "v5e:16x16": "TPU v5 lite"}  # fmt: skip
CONFIGS = (("dmf_xl2_256", 256), ("dmf_xl2_256", 1024), ("dmf_xl2_512", 256))
# From the fastest to the smallest: fewer saved activations, then smaller microbatches.
LADDER = (
    {"model.remat": "none"},
    {"model.remat": "dots"},
    {"model.remat": "dots", "gradient_accumulation": 2},
    {"model.remat": "dots", "gradient_accumulation": 4},
    {"model.remat": "full", "gradient_accumulation": 4},
)
PUBLISHED = ("improved_meanflow:xl2", "pixel_meanflow:h16")
FURTHER_CASES = (
    # 256 chips as sixteen slices, for comparison with one axis.
    Case("v5e:16x16", "dmf_xl2_256", 256, {"model.remat": "none", "mesh.slices": 16}),
    # Two slices that are connected through their hosts.
    Case("2 x v5e:4x4", "dmf_xl2_256", 512, LADDER[1]),
    # Improved MeanFlow and pixel MeanFlow as published.
    *(Case(topology, config, 1024, LADDER[1]) for config in PUBLISHED
      for topology in ("v5e:16x16", "v6e:8x8")),
    # Latents with many channels and a wide head, and latents of images of 512 x 512 in 256 tokens.
    Case("v5e:4x4", "rae_256:dmf", 256, LADDER[1]),
    Case("v5e:4x4", "dc_ae_512:dmf", 256, LADDER[0]),
)  # fmt: skip
GPUS = {"h100:8": "NVIDIA H100 80GB HBM3", "h100:4x8": "NVIDIA H100 80GB HBM3",
        "a100:8": "NVIDIA A100-SXM4-80GB", "a100-40gb:8": "NVIDIA A100-SXM4-40GB",
        "h200:8": "NVIDIA H200"}  # fmt: skip
GPU_CONFIGS = (("dmf_xl2_256", 256), ("dmf_xl2_512", 256))
FURTHER_GPU_CASES = (
    # Larger batches on 80 GB, without and with rematerialisation.
    Case("h100:8", "dmf_xl2_256", 512, LADDER[0]),
    Case("h100:8", "dmf_xl2_256", 2048, LADDER[1]),
    Case("h100:8", "dmf_xl2_512", 128, LADDER[0]),
    Case("h100:8", "dmf_xl2_512", 512, LADDER[1]),
    # The other recipes on the smallest card, and on one of 80 GB.
    *(Case("a100-40gb:8", config, 256, LADDER[0])
      for config in ("sit_xl2", "sit_xl2_repa_256", "meanflow", "dmf_distilled")),
    Case("a100-40gb:8", "sit_xl2_repa_512", 256, LADDER[1]),
    *(Case("h100:8", config, 256, LADDER[0]) for config in ("meanflow", "sit_xl2_repa_256")),
    # Improved MeanFlow and pixel MeanFlow as published, and the latter with two microbatches.
    *(Case("h100:8", config, 1024, LADDER[1]) for config in PUBLISHED),
    Case("h100:8", "pixel_meanflow:h16", 1024, LADDER[2]),
)  # fmt: skip
# All programs of XL/2 with remat "none" in the tables take more than this for each sample of 256
# tokens. A case for which it is more than a chip has is not compiled.
NO_REMAT_BYTES = 0.5 * GIB


def cases(results: dict[str, Any], devices: str = "tpu") -> Iterator[Case]:
    """Yields the rows of the table: of each ladder, the cases up to the first that fits."""
    tpu = devices == "tpu"
    for topology, device in (TOPOLOGIES if tpu else GPUS).items():
        for config, batch in CONFIGS if tpu else GPU_CONFIGS:
            for settings in LADDER:
                case = Case(topology, config, batch, settings)
                if settings["model.remat"] == "none" and _is_too_large(case, device):
                    continue
                yield case
                if fits(results.get(case.key, {})):
                    break
    yield from FURTHER_CASES if tpu else FURTHER_GPU_CASES


def fits(result: dict[str, Any]) -> bool:
    """Whether a compiled program fits into the memory of a chip."""
    return "total" in result and result["total"] <= program_memory(result["device"])


def _is_too_large(case: Case, device: str) -> bool:
    """Whether a case without rematerialisation cannot fit."""
    tokens = 1024 if case.config.endswith("512") else 256
    return NO_REMAT_BYTES * case.batch / case.chips * tokens / 256 > program_memory(device)


def compile_case(case: Case) -> dict[str, Any]:
    """The result of `dmf compile`, or its error, with the machine."""
    fields = {"data.batch_size": case.batch, **case.settings}
    file, colon, row_name = case.config.partition(":")
    output = Path(_OUTPUT.value).with_suffix(".partial")
    slices, topology = case.slices
    command = [sys.executable, "-m", "dmf", "compile",
               f"--config=configs/{file}.py{colon}{row_name}", f"--topology={topology}",
               f"--slices={slices}", f"--output={output}",
               *(f"--config.{name}={value}" for name, value in fields.items())]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not output.exists():
        return {"error": done.stderr.strip().splitlines()[-1], "machine": machine()}
    result = json.loads(output.read_text())
    output.unlink()
    return result | {"machine": machine()}


def row(case: Case, result: dict[str, Any]) -> str:
    """A row of the table."""
    start = (f"| {case.topology} | {case.config} | {case.batch} | {case.mesh} | "
             f"{case.settings['model.remat']} | {case.settings.get('gradient_accumulation', 1)} | ")
    if "error" in result:
        return f"{start}{result['error']} | | | | | | | |"
    collectives = [Collective(**fields) for fields in result["collectives"]]
    sent = [f"{sum(c.sent for c in part) / GIB:.2f}" if part and fits(result) else "-"
            for part in (collectives, [c for c in collectives if c.between_slices])]
    return (f"{start}{result['temporaries'] / GIB:.2f} | {result['total'] / GIB:.2f} | "
            f"{program_memory(result['device']) / GIB:.2f} | "
            f"{'yes' if fits(result) else 'no'} | "
            f"{sent[0]} | {sent[1]} | {result['step_flops'] / result['devices'] / 1e12:.1f} | "
            f"{result['seconds_to_compile']:.0f} |")


def _report(results: dict[str, Any]) -> None:
    """Prints and writes the table of the results so far."""
    kind = {"tpu": "slice", "gpu": "GPUs"}[_DEVICES.value]
    lines = [f"| {kind} | config | batch | mesh | remat | microbatches | temporaries GiB | "
             "total GiB | memory GiB | fits | sent GiB | between slices | TFLOP per chip | "
             "compiled in s |",
             "|" + "---|" * 14]
    compiled = [(case, results[case.key]) for case in cases(results, _DEVICES.value)
                if case.key in results]
    lines += [row(case, result) for case, result in compiled]
    machines = "; ".join(dict.fromkeys(result["machine"] for _, result in compiled))
    rest = "fsdp 1, tensor 1, compute sharing, flash attention"
    text = "\n".join([*lines, "", f"All with {rest}. Compiled on {machines}."])
    print(text, flush=True)
    Path(_OUTPUT.value).write_text(text + "\n")


def main(_: Sequence[str]) -> None:
    """Compiles the cases without a result, and writes the table after each."""
    path = Path(_OUTPUT.value).with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {}
    _report(results)
    for case in cases(results, _DEVICES.value):
        if case.key not in results:
            results[case.key] = compile_case(case)
            path.write_text(json.dumps(results, indent=1) + "\n")
            _report(results)


if __name__ == "__main__":
    start(main)
