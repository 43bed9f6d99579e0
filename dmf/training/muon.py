"""Muon: steps along the orthogonalised momentum of each matrix, and Adam for all that is none."""

import dataclasses
import re
from typing import Any

import jax
import optax
from optax import contrib

from dmf.errors import InputError, check_choice
from dmf.runtime.sharding import constrain_parts
from dmf.training.optimizer import Optimizer, check_adam, check_decay_rates
from dmf.types import Params

MATRICES = ("blocks", "all")
# The axes of kernels by their paths: those of the inputs and those of the outputs. All others tell
# matrices apart that are stacked: the blocks, q, k and v, and the vectors of the modulation.
_BLOCK_MATRICES = (
    (r"(^|/)blocks/attention/qkv/kernel$", (-4,), (-2, -1)),
    (r"(^|/)blocks/attention/out/kernel$", (-3, -2), (-1,)),
    (r"(^|/)blocks/modulation/linear/kernel$", (-3,), (-1,)),
    (r"(^|/)blocks/(.*/)?kernel$", (-2,), (-1,)),
)
# Linear layers outside of blocks: embeddings of numbers, and the last layers. Tables, learned
# tokens and the linear layer of the patches, a convolution, are none.
_OTHER_MATRICES = (
    (r"_embedding/(.*/)?(in|out)/kernel$", (-2,), (-1,)),
    (r"(^|/)(final|[uv]_head)/linear/kernel$", (-2,), (-1,)),
    (r"(^|/)final/modulation/linear/kernel$", (-3,), (-1,)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon of Optax for matrices, each by itself, and Adam with the same learning rate for all that
    is none: tables, norms, gates, biases (https://kellerjordan.github.io/posts/muon).

    The momentum of a matrix, with Nesterov's step, is orthogonalised by five Newton-Schulz
    iterations and scaled by sqrt(max(1, outputs / inputs)). Adam has Nesterov's step too.

    Attributes:
      learning_rate: peak learning rate, which the warm-up ends at; positive.
      matrices: which parameters are matrices: "blocks", the kernels of the blocks; or "all", also
        those of the embeddings of times and guidance and of the last layers, as in pixel MeanFlow.
      momentum: decay rate of the momentum of matrices, in [0, 1).
      b1: decay rate of Adam's first moment, in [0, 1).
      b2: decay rate of Adam's second moment, in [0, 1).
      eps: term added to norms and to roots of second moments for numerical stability; positive.
      weight_decay: decoupled weight decay, multiplied by the learning rate; 0 for none.
    """

    learning_rate: float = 1e-3
    matrices: str = "blocks"
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "matrices", MATRICES)
        check_decay_rates(self, "momentum")
        check_adam(self)

    def update_rule(self) -> optax.GradientTransformation:
        init, update = contrib.muon(
            self.rate, beta=self.momentum, eps=self.eps, weight_decay=self.weight_decay,
            adam_b1=self.b1, adam_b2=self.b2, adam_weight_decay=self.weight_decay,
            muon_weight_dimension_numbers=self.matrix_axes,
        )

        def update_blocks(
            gradient: Params, state: Any, params: Params | None = None
        ) -> tuple[Params, Any]:
            by_blocks = _split(update(gradient, state, params), of_blocks=True)
            return _split(by_blocks, of_blocks=False)

        return optax.GradientTransformation(init, update_blocks)

    def matrix_axes(self, params: Params) -> Params:
        """The axes of the inputs and outputs of each matrix.

        >>> kernel = jax.ShapeDtypeStruct((12, 64, 3, 4, 16), "float32")
        >>> params = {"blocks": {"attention": {"qkv": {"kernel": kernel}}}, "scale": kernel}
        >>> Muon().matrix_axes(params)["blocks"]["attention"]["qkv"]["kernel"]
        MuonDimensionNumbers(reduction_axis=(-4,), output_axis=(-2, -1))

        Args:
          params: a tree of parameters, or of what has their shapes.

        Returns:
          A tree like the parameters: None for those that Adam updates.

        Raises:
          InputError: there is no matrix.
        """
        def axes(path: Any, leaf: Any) -> contrib.MuonDimensionNumbers | None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return axes_of_matrix(name, self.matrices)

        found = jax.tree_util.tree_map_with_path(axes, params)
        if not jax.tree.leaves(found):
            raise InputError("optimizer.name", "muon", "the network has no blocks/.../kernel, the "
                             "matrices that it is for; choose adamw")
        return found


def _split(tree: Any, *, of_blocks: bool) -> Any:
    """Splits the stacked matrices of a tree by blocks, or by rows as the train state. The products
    of the iterations need whole matrices: of parts by rows, each gathers them again."""

    def constrained(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_matrix = axes_of_matrix(name, "blocks")
        return constrain_parts(name, leaf, of_blocks=of_blocks) if is_matrix else leaf

    return jax.tree_util.tree_map_with_path(constrained, tree)


def axes_of_matrix(name: str, matrices: str) -> contrib.MuonDimensionNumbers | None:
    """The axes of the inputs and outputs of a parameter; None if it is no matrix.

    Args:
      name: path of the leaf.
      matrices: one of `MATRICES`.
    """
    rules = _BLOCK_MATRICES + (_OTHER_MATRICES if matrices == "all" else ())
    for pattern, inputs, outputs in rules:
        if re.search(pattern, name):
            return contrib.MuonDimensionNumbers(inputs, outputs)
    return None
