"""The paths of parameters, and the patterns that choose parameters by them.

The path of a leaf is, for example, "patch_embedding/kernel". The leaves of the blocks are stacked
by depth; each block has a path of its own, with the number of the block after "blocks", for example
"blocks/17/mlp/in/kernel" or "v_head/blocks/0/mlp/in/kernel". A pattern is a regular expression that
must match a whole path.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dmf.errors import InputError
from dmf.runtime.sharding import STACKED

# Number of similar paths that an error message suggests.
_SUGGESTIONS = 4


def paths_of_leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The path of a leaf, an array []; the path in each block [depth] for a stacked leaf.

    >>> paths_of_leaf("blocks/mlp/in/bias", (2, 64)).tolist()
    ['blocks/0/mlp/in/bias', 'blocks/1/mlp/in/bias']

    Args:
      name: names of the leaf in the tree of parameters, joined by "/".
      shape: shape of the leaf.
    """
    stacked = STACKED.search(name)
    if stacked is None:
        return np.array(name)
    stack, rest = name[: stacked.end()], name[stacked.end() :]
    return np.array([f"{stack}{block}/{rest}" for block in range(shape[0])])


def matching_paths(field: str, pattern: Any, paths: Sequence[str]) -> list[str]:
    """The paths that a pattern matches.

    Args:
      field: the config field that has the pattern, for messages.
      pattern: a regular expression.
      paths: paths of parameters.

    Raises:
      InputError: the pattern is no regular expression, or matches nothing.
    """
    try:
        matches = [path for path in paths if re.fullmatch(pattern, path)]
    except (re.error, TypeError) as error:
        raise InputError(field, pattern, f"it is no regular expression ({error})") from None
    if not matches:
        similar = difflib.get_close_matches(str(pattern), paths, _SUGGESTIONS, cutoff=0)
        raise InputError(field, pattern, f"it matches no whole path; there are {len(paths)}, "
                         f"for example {', '.join(similar)}")
    return matches
