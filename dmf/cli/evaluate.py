"""dmf evaluate --checkpoint=DIR [--steps=1,2,4] [--count=5000] [--output=FILE] [--ema=main]

Samples, and measures their distance from the dataset that the checkpoint was trained on, for each
number of steps; writes JSON. Settings of the checkpoint can be overridden: with
--config.model.conditioning=decoupled --config.model.split_depth=4 a flow model is measured as a
flow map before any training.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from dmf import cli
from dmf.typing import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Evaluates a run or an export into one JSON file."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "a run or an export", flag_values=values)
    flags.DEFINE_list("steps", None, "numbers of steps, as 1,2,4", flag_values=values)
    flags.DEFINE_integer("count", None, "number of samples", flag_values=values)
    flags.DEFINE_string(
        "output", None, "a .json file; CHECKPOINT/evaluation.json by default", flag_values=values
    )
    flags.DEFINE_string("ema", "main", "which average of a run; '' for none", flag_values=values)
    others = cli.parse_beside_overrides(verb, arguments, values, __doc__)
    cli.require(values, "checkpoint")

    from dmf import build, evaluation, loading
    from dmf.checkpoint import write_json

    config = cli.overridden(loading.read_config(values.checkpoint), others)
    if values.count is not None:
        config.evaluation.count = values.count
    try:
        steps = [int(n) for n in values.steps or config.sampling.steps]
    except ValueError:
        raise InputError(f"--steps={','.join(values.steps)}: give whole numbers") from None
    on = build.mesh(config)
    network, config, params = loading.load_network(
        values.checkpoint, values.ema, on=on, config=config
    )
    result = evaluation.evaluate(network, params, config, steps=steps, on=on)
    output = epath.Path(values.output or epath.Path(values.checkpoint) / "evaluation.json")
    write_json(output, {"checkpoint": str(values.checkpoint), "ema": values.ema, **result})
    print(output)
