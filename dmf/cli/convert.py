"""dmf convert SOURCE... --output=DIR [--split-depth=20] [--autoencoder=SOURCE]

Converts a checkpoint of another project to an export: a .pt or .pth file of PyTorch (read without
PyTorch, and without running what it holds), a .safetensors file, a directory of such a file, a
pipeline of diffusers, a directory that Orbax or Flax wrote, also in a .zip, or hf:OWNER/REPO/FILE.
The network is detected from the tensors; flags give what they do not tell. With --split-depth a
flow model becomes a flow map at once; with --autoencoder the export samples images by itself.
Several sources are the files of one network, as those of a representation autoencoder or of LPIPS.
"""

import os
from collections.abc import Sequence

from absl import flags as absl_flags

from dmf.cli import flags
from dmf.errors import InputError

# Flag, field of the network, and help.
_FIELDS = (
    ("split-depth", "split_depth", "number of blocks that see t; the others see r"),
    ("num-heads", "heads", "number of attention heads, where the size is not a published one"),
    ("input-size", "input_size", "height and width of the input, where no position table tells it"),
    ("alignment-depth", "alignment_depth", "number of blocks before the projector (REPA)"),
    ("groups", "groups", "GroupNorm groups of the autoencoder"),
)


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    others: Sequence[str] = (),
    key: str = "",
    naming: str = "",
    autoencoder: str = "",
    split_depth: int | None = None,
    num_heads: int | None = None,
    input_size: int | None = None,
    alignment_depth: int | None = None,
    groups: int | None = None,
) -> None:
    """Converts a checkpoint, also a run or an export of dmf, to an export, as `dmf convert` does.

    >>> dmf.convert("runs/digits_sit", "runs/untrained", split_depth=4)
    >>> dmf.load("runs/untrained")[0].network.split_depth
    4

    Args:
      source: a file, a directory or hf:OWNER/REPO/FILE; hf:OWNER/REPO for an export.
      output: the directory to make.
      others: more files of the same network.
      key: part of a training file (model, ema, ...), or EMA parameters of a run; empty detects it.
      naming, autoencoder: naming scheme of the file, empty to detect it; source of an autoencoder.
      split_depth: number of blocks that see t; the others see r. None for a flow model.
      num_heads, input_size: attention heads, and side of the input, where tensors do not tell.
      alignment_depth, groups: blocks before the projector (REPA); groups of an autoencoder.

    Raises:
      InputError: the checkpoint cannot be read.
    """
    from dmf.checkpoints import export, located
    from dmf.default_config import Config
    located.look_again()
    given = (split_depth, num_heads, input_size, alignment_depth, groups)
    fields = {field: n for (_, field, _), n in zip(_FIELDS, given, strict=True) if n is not None}
    export.convert(os.fspath(source), output, fields=fields, others=others, key=key, naming=naming,
                   autoencoder=autoencoder, config_class=Config)


def main(verb: str, arguments: Sequence[str]) -> None:
    """Converts a checkpoint of another project."""
    values = absl_flags.FlagValues()
    text = absl_flags.DEFINE_string
    text("output", None, "directory to make", flag_values=values)
    text("key", "", "part of a training file (model, ema, ...), or EMA parameters of a run; EMA "
         "parameters by default", flag_values=values)
    text("naming", "", "parameter naming scheme of the file (detected by default)",
         flag_values=values)
    text("autoencoder", "", "source of the autoencoder of the latents", flag_values=values)
    for flag, _, meaning in _FIELDS:
        absl_flags.DEFINE_integer(flag, None, meaning, flag_values=values)
    flags.define_plugins(values)
    sources = flags.parse(verb, arguments, values, __doc__)
    flags.require(values, "output")
    if not sources:
        raise InputError("SOURCE", None, "give a file, directory or hf:OWNER/REPO/FILE")

    convert(
        sources[0],
        values.output,
        others=sources[1:],
        key=values.key,
        naming=values.naming,
        autoencoder=values.autoencoder,
        **{flag.replace("-", "_"): values[flag].value for flag, _, _ in _FIELDS},
    )
    print(values.output)
