"""Lion: steps of one size along the sign of a momentum."""

import dataclasses

import optax

from dmf.training.optimizer import Optimizer, check_decay_rates, check_weight_decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion of Optax (arXiv:2302.06675), which stores one moment of each parameter.

    The update is the learning rate times the sign of b1 m + (1 - b1) g; then m becomes
    b2 m + (1 - b2) g.

    Attributes:
      learning_rate: peak learning rate, which the warm-up ends at; positive; published: a third to
        a tenth of AdamW's.
      b1: weight of the momentum in the step, in [0, 1).
      b2: decay rate of the momentum, in [0, 1).
      weight_decay: decoupled weight decay, multiplied by the learning rate; 0 for none; published:
        3 to 10 times AdamW's.
    """

    learning_rate: float = 3e-5
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_decay_rates(self, "b1", "b2")
        check_weight_decay(self)

    def update_rule(self) -> optax.GradientTransformation:
        return optax.lion(self.rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
