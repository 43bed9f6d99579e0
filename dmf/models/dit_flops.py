"""Operations of the matmuls of a `dmf.models.dit.DiT`.

Each of the two parts of a network counts one time embedding. The projector and the log-variance
head, which are no part of the flow map, are left out.
"""

from typing import Any

from dmf.models.wide_head import wide_head_network
from dmf.types import Flops


def block_flops(config: Any, condition_vectors: int) -> float:
    """Operations of one block.

    Args:
      config: the `DiT` of the block.
      condition_vectors: number of vectors that its modulation is computed of: 1, or one per token.
    """
    width, length = config.width, config.tokens
    linears = 2 * width**2 * (4 + 2 * config.mlp_ratio) * length
    return linears + 4 * width * length**2 + 12 * width**2 * condition_vectors


def final_flops(config: Any, condition_vectors: int) -> float:
    """Operations of the final layer; arguments as of `block_flops`."""
    return patch_flops(config) + 2 * 2 * config.width**2 * condition_vectors


def patch_flops(config: Any) -> float:
    """Operations of the linear layer between patches and tokens, in either direction."""
    return 2.0 * config.width * config.tokens * config.patch_size**2 * config.channels


def wide_head_flops(config: Any) -> float:
    """Operations of a wide head with its final layer, whose modulations have one vector per token.

    Args:
      config: the `DiT` that has the head.
    """
    head = wide_head_network(config)
    projection = 2.0 * config.width * head.width * head.tokens
    blocks = head.depth * block_flops(head, head.tokens)
    return patch_flops(head) + projection + blocks + final_flops(head, head.tokens)


def dit_flops(config: Any) -> Flops:
    """Operations of one sample, 2 for a multiply-add.

    Args:
      config: a `DiT`.
    """
    early, block = config.encoder_depth, block_flops(config, 1)
    time_embedding = 2 * (256 + config.width) * config.width
    final = final_flops(config, 1)
    head = wide_head_flops(config) if config.wide_head.depth else final
    return Flops(
        encode=patch_flops(config) + early * block + (time_embedding if early else 0),
        decode=(config.depth - early) * block + time_embedding + head,
        velocity_head=config.head_depth * block + final if config.velocity_head else 0.0,
    )
