"""The few types that every room speaks: arrays, batches, conditions, networks and flow maps; and
which values a config field may have, by the type that it is annotated with.

A flow map is a function `u(x_t, t, r, y)`: the average velocity between the times t and r, so that
`x_r = x_t + (r - t) u`. Time 0 is data and time 1 is noise, with 0 <= r <= t <= 1. Images and
latents are NHWC; times and per-sample losses are vectors of length b.
"""

import collections.abc
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dmf.errors import InputError

Images = Float[Array, "b h w c"]
Times = Float[Array, "b"]
PerSample = Float[Array, "b"]
Dropped = Bool[Array, "b"]
Features = Float[Array, "b n d"]
PRNGKey = Key[Array, ""]
PRNGKeys = Key[Array, "b"]
Params = Mapping[str, Any]
Metrics = dict[str, jax.Array]
# Dtypes that a network may compute in; parameters are float32.
COMPUTE_DTYPES = ("float32", "bfloat16")
# An int; a symbol while a function of any number of samples is exported.
Size = Any
# Types of config fields: bool, int, float, str, None, `typing.Literal`, tuples and lists of them,
# and unions. A field of another type may have any value.
_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text",
          types.NoneType: "None"}  # fmt: skip
# A whole number is a number too; True is neither.
_CLASSES = {int: (int,), float: (int, float), bool: (bool,), str: (str,),
            types.NoneType: (types.NoneType,)}  # fmt: skip

FlowMap = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


@runtime_checkable
class Condition(Protocol):
    """What a network is told about each sample beside x_t and the times.

    A condition is a pytree of arrays whose leading axis is the batch. Objectives, guidance and
    samplers call these methods and never look inside; the network that made it knows the rest.
    `ClassLabels` is one; examples/vector_condition.py has another.
    """

    @property
    def count(self) -> Size:
        """Number of samples b."""
        ...

    def drop(self, dropped: Dropped) -> "Condition":
        """The same condition, null for the samples where `dropped` [b] is true."""
        ...

    def null(self) -> "Condition":
        """The condition of the unconditional pass: null for every sample.

        Raises:
          InputError: the network knows no null condition.
        """
        ...


class ClassLabels(flax.struct.PyTreeNode):
    """Class labels as a condition; the label `num_classes` is the null label.

    >>> y = ClassLabels(jnp.array([3, 7]), num_classes=10)
    >>> y.drop(jnp.array([False, True])).labels.tolist()
    [3, 10]

    Attributes:
      labels: [b] int32 in [0, num_classes].
      num_classes: number of classes; 0 for a network without labels, whose only label is 0.
    """

    # JAX rebuilds pytrees with leaves that are no arrays, so that the type is `Any`.
    labels: Any
    num_classes: int = flax.struct.field(pytree_node=False)

    @property
    def count(self) -> Size:
        return self.labels.shape[0]

    def drop(self, dropped: Dropped) -> "ClassLabels":
        return self.replace(labels=jnp.where(dropped, self.num_classes, self.labels))

    def null(self) -> "ClassLabels":
        if not self.num_classes:
            raise InputError("model.num_classes", 0, "this network has no labels to guide it by; "
                             "set the guidance scale to 1")
        return self.replace(labels=jnp.full_like(self.labels, self.num_classes))


class GuidanceInput(NamedTuple):
    """The guidance that a network takes as an input (improved MeanFlow, arXiv:2512.02012).

    Attributes:
      scale: [b] effective guidance scale; 1 is none.
      start, end: [b] ends of the closed interval of times t in which the scale applies.
    """

    scale: jax.Array
    start: jax.Array
    end: jax.Array


class GuidedCondition(flax.struct.PyTreeNode):
    """A condition together with the guidance that is asked of the network itself.

    Attributes:
      condition: the condition.
      guidance: the guidance scale and interval of each sample.
    """

    condition: Any
    guidance: GuidanceInput

    @property
    def count(self) -> Size:
        return self.condition.count

    def drop(self, dropped: Dropped) -> "GuidedCondition":
        return self.replace(condition=self.condition.drop(dropped))

    def null(self) -> Condition:
        return self.condition.null()


class Batch(NamedTuple):
    """Training samples.

    Attributes:
      x: [b, h, w, c] float32, data at t = 0: latents, or pixels in [-1, 1].
      y: what the dataset says of each sample, of which `Network.condition` makes the condition: [b]
        int32 labels in [0, num_classes), or any other pytree of arrays [b, ...].
      features: [b, n, d] patch features of a frozen encoder, for representation alignment.
      images: [b, h, w, c] uint8, the images that x was made of, where features are yet to be
        computed from them.
    """

    x: jax.Array
    y: Any
    features: jax.Array | None = None
    images: jax.Array | None = None


class Flops(NamedTuple):
    """Floating-point operations of one sample through the two parts of a network.

    Attributes:
      encode: operations of `Network.encode`, 2 for a multiply-add.
      decode: operations of `Network.decode`.
      velocity_head: operations that `Network.decode_heads` adds to those of `decode`; 0 for a
        network without a velocity head.
    """

    encode: float
    decode: float
    velocity_head: float = 0.0

    @property
    def forward(self) -> float:
        """Operations of one forward pass, with one output: u."""
        return self.encode + self.decode


@runtime_checkable
class Network(Protocol):
    """A family of flow maps indexed by parameters; what objectives are written against.

    `dmf.models.simple_network.SimpleNetwork` implements all of it but `sample_shape`,
    `num_classes`, `init` and `apply`.
    """

    @property
    def num_classes(self) -> int:
        """Number of class labels; 0 for a network that knows none."""
        ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one sample."""
        ...

    @property
    def guidance_input(self) -> bool:
        """Whether the network takes the guidance scale and interval as an input."""
        ...

    @property
    def velocity_head(self) -> bool:
        """Whether the network has a second head, which predicts the velocity v."""
        ...

    @property
    def prediction(self) -> str:
        """What the network predicts: "velocity"; or "data" or "noise", of which it makes
        velocities."""
        ...

    @property
    def min_time(self) -> float:
        """The least number that a network with prediction="data" divides by instead of t, and with
        "noise" instead of 1 - t."""
        ...

    @property
    def encoder_depth(self) -> int:
        """Number of blocks that `encode` runs: those before the first that depends on r."""
        ...

    @property
    def full_remat(self) -> bool:
        """Whether the backward pass recomputes the whole forward pass."""
        ...

    @property
    def flops(self) -> Flops:
        """Operations of one sample, 2 for a multiply-add."""
        ...

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32."""
        ...

    def cast(self, params: Params) -> Params:
        """Parameters, or a gradient by them, in the dtypes that gradients are collected in."""
        ...

    def condition(self, y: Any) -> Condition:
        """The condition of what a dataset says of samples; a condition is returned as it is."""
        ...

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Any) -> Images:
        """The average velocity u(x_t, t, r, y) from t to r [b, h, w, c]; the instantaneous velocity
        where r = t. y is a `Condition`, or what `condition` makes one of."""
        ...

    def apply_heads(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Images]:
        """(u, v): the average velocity and the output of the velocity head, from one pass.

        Raises:
          InputError: the network has no velocity head.
        """
        ...

    def velocity(self, params: Params, x_t: Images, t: Times, y: Any) -> Images:
        """The instantaneous velocity v(x_t, t, y): of the velocity head at r = t; without one it is
        u(x_t, t, t, y)."""
        ...

    def encode(self, params: Params, x_t: Images, t: Times, y: Any) -> Any:
        """The part of the network that does not depend on r, as a pytree of arrays."""
        ...

    def decode(self, params: Params, hidden: Any, r: Times, y: Any) -> Images:
        """The average velocity u(x_t, t, r, y), from `hidden = encode(params, x_t, t, y)`."""
        ...

    def decode_heads(
        self, params: Params, hidden: Any, r: Times, y: Any
    ) -> tuple[Images, Images]:
        """(u, v) as `apply_heads` returns them, from `hidden = encode(params, x_t, t, y)`.

        Raises:
          InputError: the network has no velocity head.
        """
        ...

    def apply_with_features(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Features]:
        """The average velocity, and the projected tokens of an inner block (REPA)."""
        ...

    def log_variance(self, params: Params, t: Times, r: Times) -> PerSample:
        """The learned log of the expected squared error at (t, r)."""
        ...


def has_type(value: Any, annotation: Any) -> bool:
    """Whether a value is one of a type.

    >>> has_type(1, float), has_type("1", int), has_type([1, 2], tuple[int, ...])
    (True, False, True)
    """
    return any(_has_one_type(value, kind) for kind in alternatives(annotation))


def _has_one_type(value: Any, kind: Any) -> bool:
    if kind in _CLASSES:
        return isinstance(value, _CLASSES[kind]) and (kind is bool or not isinstance(value, bool))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if element_type(kind)[0] is None:
        return True
    if not isinstance(value, tuple | list):
        return False
    elements = element_types(kind, len(value))
    return elements is not None and all(map(has_type, value, elements))


def describe_type(annotation: Any) -> str:
    """Which values a type has, in words.

    >>> describe_type(int | None), describe_type(tuple[float, float])
    ('a whole number or None', '2 numbers, for example (0.5, 1.5)')
    """
    return " or ".join(_described(kind) for kind in alternatives(annotation))


def _described(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    element, length = element_type(kind)
    if element is None:
        return _NAMES.get(kind, "it in the config file: no flag can say it")
    parts = typing.get_args(element)
    if typing.get_origin(element) is tuple and len(set(parts)) > 1:
        example = ", ".join({float: "0.5", int: "2", str: "'a'"}.get(part, "0") for part in parts)
        return f"tuples of {', '.join(map(_described, parts))}, for example (({example}),)"
    if element_type(element)[0] is float:
        return "pairs of numbers, for example ((0.2, 0.8), (0.4, 0.65))"
    noun = {int: "whole numbers", float: "numbers", str: "texts"}.get(element, "values")
    example = {float: "(0.5, 1.5)", str: "('a', 'b')"}.get(element, "(1, 2)")
    return f"{noun if length is None else f'{length} {noun}'}, for example {example}"


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, text last, which every text stands for; or the type itself."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = typing.get_args(annotation) if union else (annotation,)
    return sorted(members, key=lambda kind: kind is str)


def element_type(kind: Any) -> tuple[Any, int | None]:
    """The type of the elements of a sequence and their number, None for any number; the type is
    None if `kind` is no sequence."""
    if kind in (tuple, list):
        return Any, None
    if typing.get_origin(kind) not in (tuple, list, collections.abc.Sequence):
        return None, None
    arguments = typing.get_args(kind)
    fixed = typing.get_origin(kind) is tuple and arguments[-1] is not Ellipsis
    return arguments[0], len(arguments) if fixed else None


def element_types(kind: Any, count: int) -> Sequence[Any] | None:
    """The types of the elements of a sequence that has so many; None if none has.

    >>> element_types(tuple[str, float], 2), element_types(tuple[int, ...], 2)
    ((<class 'str'>, <class 'float'>), (<class 'int'>, <class 'int'>))
    """
    element, length = element_type(kind)
    if length is None:
        return (element,) * count
    return typing.get_args(kind) if length == count else None
