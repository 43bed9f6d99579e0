"""The wide head of a diffusion transformer: few wide blocks after a trunk of many narrow ones.

Latents with many channels need wide tokens, which a whole trunk of that width would make expensive
(DiT^DH of RAE, arXiv:2510.11690; the head is that of DDT, arXiv:2504.05741). The blocks of the head
take the noisy latent itself, and the tokens of the trunk only as their condition: a vector for each
token, in place of one for each sample.
"""

import dataclasses
import functools
from typing import Any

from dmf.errors import check_between, check_valid
from dmf.models.simple_network import LARGEST_DEPTH, LARGEST_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideHead:
    """The sizes of the wide head of a `DiT`.

    Attributes:
      depth: number of blocks, 0 for no wide head; published: 2.
      width: width of its tokens, a multiple of 4 and of `heads`; published: 2048.
      heads: number of attention heads, which divides `width`; published: 16.
    """

    depth: int = 0
    width: int = 2048
    heads: int = 16

    def __post_init__(self):
        check = functools.partial(check_valid, self)
        check_between(self, 0, LARGEST_DEPTH, "depth")
        check_between(self, 1, LARGEST_SIZE, "width", "heads")
        check(self.width % self.heads == 0, "heads", f"it must divide width={self.width}")
        check(self.width % 4 == 0, "width", "the position table needs a multiple of 4")
        for name in ("width", "heads"):
            default = getattr(WideHead, name)
            check(self.depth or getattr(self, name) == default, name, "there is no wide head with "
                  f"depth=0; give a depth, or leave this at {default}")


def wide_head_network(config: Any) -> Any:
    """The network whose blocks are those of the wide head; it has no other use.

    Args:
      config: the `DiT` that has the head.

    Returns:
      A `DiT` with the sizes of the head, and without a head.
    """
    head, fields = config.wide_head, type(config)
    return dataclasses.replace(
        config, depth=head.depth, width=head.width, heads=head.heads, wide_head=WideHead(),
        conditioning="flow", split_depth=None, block_times="split",
        embedded_times=fields.embedded_times, alignment_depth=0,
    )  # fmt: skip
