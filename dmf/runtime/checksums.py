"""Checksums of arrays, which do not depend on how the arrays are sharded.

Files can be truncated or corrupted on a disk without an error. A checksum depends on every bit of
an array; it is computed before the array is saved and after it is read. It is a sum of integers, so
it is the same for every sharding, and each device computes the part of its own shard: arrays are
never gathered on one host.
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

from dmf.errors import Damaged, RunError

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
# Words in errors of file systems that may not occur again, or that concern permissions.
_UNREADABLE_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED",
                     "Permission denied", "RESOURCE_EXHAUSTED", "Input/output error")
# Errors of the operating system about a file that is missing, or is no file: it was damaged.
_MISSING_FILE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def _checksum(x: jax.Array) -> jax.Array:
    """The sum over the words of an array, each hashed together with its index.

    The hash is a bijection of 32 bits (the finalizer of MurmurHash3): a change of one word always
    changes the sum, any other change does with a probability of 1 - 2^-32.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index = along if axis == 0 else index * jnp.uint32(size) + along
    h = words + index * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32) + jnp.uint32(math.prod(words.shape) % 2**32)


_checksums = jax.jit(lambda tree: jax.tree.map(_checksum, tree))


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a tree.

    >>> checksums({"blocks": {"bias": jnp.zeros(3)}})
    {'blocks/bias': 3483439876}

    Args:
      tree: tree of JAX arrays, sharded in any way, or NumPy arrays. All processes that hold a shard
        must call this function.

    Returns:
      Numbers in [0, 2^32) by the path of the array, for example "blocks/mlp/in/kernel".
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(checksum)
        for path, checksum in leaves
    }


def check_checksums(restored: Mapping[str, int], saved: Mapping[str, int]) -> None:
    """Compares the checksums of restored arrays with those of the saved arrays.

    >>> check_checksums({"bias": 1}, {"bias": 1})

    Args:
      restored: checksums of the arrays that were read.
      saved: checksums of the arrays that were saved.

    Raises:
      Damaged: they differ; the error names the first array.
    """
    for name in sorted(saved.keys() | restored.keys()):
        if name not in restored:
            raise Damaged(f"{name} is missing")
        if name not in saved:
            raise Damaged(f"{name} is not one of the saved arrays")
        if restored[name] != saved[name]:
            raise Damaged(f"{name} differs from the saved array")


@contextmanager
def reading_errors() -> Iterator[None]:
    """Turns errors of reading a checkpoint, from any library, into one line.

    Raises:
      Damaged: the files are damaged.
      RunError: the files cannot be read at the moment, or by this user.
    """
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        unreadable = isinstance(error, OSError) and error.errno not in _MISSING_FILE
        unreadable = unreadable or isinstance(error, MemoryError)
        if unreadable or any(word in reason for word in _UNREADABLE_WORDS):
            raise RunError(f"the checkpoint cannot be read: {reason}") from error
        raise Damaged(f"{type(error).__name__}: {reason}") from None


def fingerprint(params: Any) -> str:
    """A short hash of all bits of a tree of arrays, to tell parameters apart.

    >>> fingerprint({"bias": np.zeros(3, np.float32)})
    '15ec7bf0b50732b4'

    Args:
      params: tree of arrays that this process holds completely.

    Returns:
      16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        # As bytes, because hashlib does not know buffers of dtypes like bfloat16.
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]
