"""dmf convert SOURCE --output=DIR [--split-depth=20] [--autoencoder=SOURCE]

Makes an export of a checkpoint of another project: a .pt or .pth file of PyTorch (read without
PyTorch, and without running what it holds), a .safetensors file, a directory that Orbax wrote, or
hf:OWNER/REPO/FILE. The network is found out from the tensors; what they do not tell is given by
flags. With --split-depth a flow model becomes a flow map at once; with --autoencoder the export
makes images by itself.
"""

from collections.abc import Sequence

from absl import flags

from dmf import cli
from dmf.typing import InputError

# Flag, field of the network, and what it is.
_FIELDS = (
    ("split-depth", "split_depth", "blocks that see t; the others see r"),
    ("num-heads", "heads", "attention heads, where the size is not a published one"),
    ("input-size", "input_size", "side of the input, where no position table tells it"),
    ("alignment-depth", "alignment_depth", "blocks before the projector (REPA)"),
    ("groups", "groups", "of an autoencoder's normalisations"),
)


def main(verb: str, arguments: Sequence[str]) -> None:
    """Converts a checkpoint of another project."""
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "a directory to make", flag_values=values)
    flags.DEFINE_string(
        "key", "", "which part of a training file: model, ema, ...; or which average of a run; an "
        "average by default", flag_values=values,
    )
    flags.DEFINE_string("spelling", "", "whose names; found out by default", flag_values=values)
    flags.DEFINE_string(
        "autoencoder", "", "source of the autoencoder of the latents", flag_values=values
    )
    for flag, _, does in _FIELDS:
        flags.DEFINE_integer(flag, None, does, flag_values=values)
    named = [argument for argument in arguments if not argument.startswith("-")]
    cli.parse(verb, [a for a in arguments if a not in named], values, __doc__)
    cli.require(values, "output")
    if len(named) != 1:
        raise InputError(f"SOURCE={' '.join(named) or None}: give one file, directory or "
                         "hf:OWNER/REPO/FILE")

    from dmf import exports

    given = {field: values[flag].value for flag, field, _ in _FIELDS
             if values[flag].value is not None}
    exports.convert(
        named[0],
        values.output,
        given=given,
        key=values.key,
        spelling=values.spelling,
        autoencoder=values.autoencoder,
    )
    print(values.output)
