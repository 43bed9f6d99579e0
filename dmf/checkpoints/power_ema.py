"""Power-function EMAs of any width, synthesised from those that a run kept (arXiv:2312.02696).

The power-function EMA of exponent gamma after t steps weighs the parameters of step i by the
integral of its profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) over [i - 1, i]. Its width is
the standard deviation of the profile as a fraction of t. A run keeps few widths, and snapshots of
them on the way; the profile of another width is close to a sum of their profiles with weights, and
the parameters are the same sum.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmf.checkpoints import params as stored_params
from dmf.checkpoints.located import local_directory
from dmf.checkpoints.params import CHECKPOINTS, EMA_PREFIX, SNAPSHOTS
from dmf.errors import Damaged, InputError, RunError
from dmf.registry import at
from dmf.runtime.files import absolute
from dmf.runtime.progress import log
from dmf.types import Params

# Beyond it the profile falls with the step: the uniform one has width sqrt(1 / 12) = 0.2887.
LARGEST_STD = 0.29
PREFIX = "std="
# A profile that is off by a larger fraction of its norm is refused.
MAX_ERROR = 0.2
# Stored averages with a smaller weight are left out: float32 does not see them.
_SMALLEST_WEIGHT = 1e-8


class Profile(NamedTuple):
    """The profile of a power-function EMA.

    Attributes:
      step: number of training steps t; or an array of them.
      exponent: gamma, > -1/2; or an array.
    """

    step: Any
    exponent: Any


class Stored(NamedTuple):
    """A power-function EMA on disk.

    Attributes:
      profile: its profile.
      item: the Orbax item of its parameters.
    """

    profile: Profile
    item: epath.Path


def exponent(std: float) -> float:
    """The exponent gamma of a width: std = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).

    >>> round(exponent(0.1), 2), round(exponent(0.05), 2)
    (6.94, 16.97)

    Args:
      std: standard deviation of the profile as a fraction of the steps so far, in (0, 0.29).

    Raises:
      InputError: it lies outside.
    """
    if not 1e-3 <= std < LARGEST_STD:
        raise InputError("std", std, "the width of a power EMA is a fraction of the steps so far, "
                         f"from 0.001 to below {LARGEST_STD} (0.05 is narrow, 0.2 wide)")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(roots[np.isreal(roots)].real))


def inner_product(a: Profile, b: Profile) -> Any:
    """The integral of the product of two profiles, of arrays of them by broadcasting.

    >>> float(inner_product(Profile(2.0, 0.0), Profile(4.0, 1.0)))
    0.125
    """
    (a_step, a_exponent), (b_step, b_exponent) = a, b
    early, late = np.minimum(a_step, b_step), np.maximum(a_step, b_step)
    late_exponent = np.where(np.less_equal(a_step, b_step), b_exponent, a_exponent)
    factor = (a_exponent + 1) * (b_exponent + 1) / (a_exponent + b_exponent + 1)
    return factor * (early / late) ** late_exponent / late


def weights(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The weights of stored profiles whose sum is closest to a wanted one, in least squares.

    They add up to 1, so that parameters that never changed come out unchanged.

    >>> solution, error = weights([Profile(4, 2.0), Profile(8, 2.0)], Profile(8, 2.0))
    >>> [round(abs(weight), 6) for weight in solution.tolist()], round(error, 6)
    ([0.0, 1.0], 0.0)

    Args:
      stored: the profiles, of steps up to that of the wanted one.
      wanted: the profile to come close to.

    Returns:
      The weights [n], float64; and the norm of the difference as a fraction of the wanted norm.
    """
    # Steps as fractions, and profiles of unit norm: numbers of one size.
    each = Profile(*np.array(stored, np.float64).T)._replace(
        step=np.array([profile.step for profile in stored]) / wanted.step)
    target = Profile(1.0, wanted.exponent)
    norms = np.sqrt(inner_product(each, each))
    columns = Profile(each.step[:, None], each.exponent[:, None])
    products = inner_product(columns, each) / np.outer(norms, norms)
    with_target = inner_product(each, target) / norms
    # The multiplier of the condition on the sum is the last unknown.
    system = np.block([[products, 1 / norms[:, None]], [1 / norms, 0.0]])
    solution = np.linalg.lstsq(system, np.append(with_target, 1.0), rcond=None)[0][:-1]
    square = inner_product(target, target)
    error = square - 2 * solution @ with_target + solution @ products @ solution
    return solution / norms, float(np.sqrt(max(error, 0.0) / square))


def requested_std(ema: str) -> float | None:
    """The width that a name of EMA parameters asks for, as std=0.1; None for the name of an EMA.

    >>> requested_std("std=0.1"), requested_std("main")
    (0.1, None)

    Raises:
      InputError: the width is no number, or out of range.
    """
    if not ema.startswith(PREFIX):
        return None
    text = ema.removeprefix(PREFIX)
    try:
        std = float(text)
    except ValueError:
        raise InputError("ema.std", text, "give a width, as std=0.1") from None
    with at("ema"):
        exponent(std)
    return std


def synthesise(
    directory: epath.PathLike, abstract: Params, std: float, **allowed: tuple[str, ...]
) -> Params:
    """The parameters of the power-function EMA of a width, from all that a run kept until a step.

    Args:
      directory: a workdir, for the step of its newest checkpoint, or one of its checkpoints/STEP.
      abstract, allowed: as for `params.restore_params`.
      std: the width, in (0, 0.29).

    Returns:
      The parameters in the structure of `abstract`.

    Raises:
      InputError: there is no run, it kept no power EMAs, or they are too few for this width; or it
        has another architecture.
      RunError: a snapshot or the checkpoint is damaged.
    """
    directory, total = absolute(local_directory(directory)), None
    chosen, summary = weighted_averages(directory, std)
    log(summary)
    for weight, item in chosen:
        params = _restore(directory, item, abstract, allowed)
        total = _scaled(params, weight) if total is None else _added(total, params, weight)
    return total


def weighted_averages(
    directory: epath.PathLike, std: float
) -> tuple[list[tuple[float, epath.Path]], str]:
    """The weights of the stored averages that a width is made of, with their Orbax items; and a
    line that says how close the sum of their profiles is.

    Raises:
      InputError: there is no run, it kept no power EMAs, or they are too few for this width.
    """
    stored, step = stored_averages(absolute(local_directory(directory)), std)
    wanted = Profile(step, exponent(std))
    solution, error = weights([average.profile for average in stored], wanted)
    steps, widths = ({average.profile[i] for average in stored} for i in range(2))
    summary = (f"from {len(widths)} power EMA{'s' * (len(widths) > 1)} at {len(steps)} "
            f"step{'s' * (len(steps) > 1)}, its weights are {error:.1%} off")
    if error > MAX_ERROR:
        raise InputError("ema", f"{PREFIX}{std}", f"{summary}; choose a width nearer to theirs, or "
                         "train with two widths and more snapshots (run.keep_snapshots)")
    pairs = zip(solution.tolist(), stored, strict=True)
    chosen = [(weight, average.item) for weight, average in pairs
              if abs(weight) > _SMALLEST_WEIGHT]
    return chosen, f"EMA of std={std} at step {step}: {summary}"


def stored_averages(directory: epath.Path, std: float) -> tuple[list[Stored], int]:
    """The power-function EMAs that a run kept until the step of a checkpoint, and that step.

    Raises:
      InputError: there is no checkpoint of a run, or the run has no power EMAs.
    """
    run, _ = stored_params.split_step(directory)
    step = stored_params.latest_step(directory)
    if step is None:
        raise InputError("ema", f"{PREFIX}{std}", f"{directory} is no run with a checkpoint, and "
                         "an export holds one set of parameters; give the workdir of a run")
    widths = _power_widths(stored_params.read_config(directory))
    if not widths:
        raise InputError("ema", f"{PREFIX}{std}", f"{directory} was trained without power EMAs; "
                         "train with --config.emas.narrow.name=power "
                         "--config.emas.narrow.std=0.05 --config.emas.wide.name=power "
                         "--config.emas.wide.std=0.1")
    snapshots = {int(path.name): path for path in (run / SNAPSHOTS).glob("[0-9]*")
                 if path.name.isdecimal()}
    folders = {saved: path for saved, path in snapshots.items() if saved < step}
    folders[step] = run / CHECKPOINTS / str(step)
    return [Stored(Profile(saved, width), folders[saved] / f"{EMA_PREFIX}{name}")
            for saved in sorted(folders) for name, width in sorted(widths.items())], step


def _power_widths(config: dict[str, Any]) -> dict[str, float]:
    """The exponents of the power EMAs of a stored config, by name, which may hold anything."""
    found = {}
    emas = config.get("emas")
    for name, part in emas.items() if isinstance(emas, dict) else ():
        if isinstance(part, dict) and part.get("name") == "power":
            std = part.get("std")
            with at(f"emas.{name}"):
                found[name] = exponent(std if isinstance(std, int | float) else -1.0)
    return found


def _restore(
    directory: epath.Path, item: epath.Path, abstract: Params, allowed: dict[str, tuple[str, ...]]
) -> Params:
    """The parameters of one average; RunError names the folder that is damaged."""
    try:
        stored_params.read_position(item.parent)
        return stored_params.restore_item(directory, item, abstract, **allowed)
    except Damaged as error:
        remedy = ("remove it to do without" if item.parent.parent.name == SNAPSHOTS
                  else "give another checkpoint")
        raise RunError(f"{item.parent}: it is damaged ({error}); {remedy}") from None


@jax.jit
def _scaled(params: Params, weight: Any) -> Params:
    return jax.tree.map(lambda x: jnp.float32(weight) * x, params)


@functools.partial(jax.jit, donate_argnums=0)
def _added(total: Params, params: Params, weight: Any) -> Params:
    return jax.tree.map(lambda a, x: a + jnp.float32(weight) * x, total, params)
