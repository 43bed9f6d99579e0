"""Whether arrays are those that were saved: one number for each, whatever the mesh.

Files can be cut short or change on a disk without a word. A number that depends on every bit of an
array is made of it before it is saved and after it was read. It is a sum of integers, so the same
however the array is split, and made where the array lies: an array is never brought to one host.
"""

import errno
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmf.typing import Damaged, RunError

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _number(x: jax.Array) -> jax.Array:
    """A sum over the words of an array, each stirred together with its place in it.

    The stirring is a bijection of 32 bits (the finalizer of MurmurHash3): a change of one word
    always shows, any other with a chance of 1 - 2^-32.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = along if axis == 0 else place * jnp.uint32(size) + along
    h = words + place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32) + jnp.uint32(math.prod(words.shape) % 2**32)


_numbers = jax.jit(lambda tree: jax.tree.map(_number, tree))


def checksums(tree: Any) -> dict[str, int]:
    """A number in [0, 2^32) for each array of a tree, by its path, as "blocks/mlp/in/kernel".

    Args:
      tree: of arrays, of JAX (sharded in any way) or numpy. All processes that hold a part of it
        must call this.
    """
    numbers, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_numbers(tree)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(number)
        for path, number in numbers
    }


def check(found: Mapping[str, int], saved: Mapping[str, int]) -> None:
    """Compares what was read with what was saved.

    Raises:
      Damaged: they differ; it names the first array.
    """
    for name in sorted(saved.keys() | found.keys()):
        if name not in found or name not in saved:
            raise Damaged(f"{name} is {'missing' if name in saved else 'not of what was saved'}")
        if found[name] != saved[name]:
            raise Damaged(f"{name} is not what was saved")


@contextmanager
def reading() -> Iterator[None]:
    """Turns what a damaged file raises, in whatever library, into one line.

    Raises:
      Damaged: what was found cannot be what was written.
      RunError: it cannot be read just now, or by this user.
    """
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        unreadable = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED",
                      "Permission denied", "RESOURCE_EXHAUSTED", "Input/output error")
        # What is missing, or is no file, was damaged; all else that the system says may pass.
        passing = isinstance(error, OSError) and error.errno not in (
            None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR
        )
        if passing or isinstance(error, MemoryError) or any(w in reason for w in unreadable):
            raise RunError(f"the checkpoint cannot be read: {reason}") from error
        raise Damaged(f"{type(error).__name__}: {reason}") from None


def fingerprint(params: Any) -> str:
    """Tells parameters, or any other tree of arrays, from others."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        # As bytes: a buffer of bfloat16, say, is none that hashlib knows.
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
