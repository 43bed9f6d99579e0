"""Files with something wrong in them."""

import numpy as np


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A few bytes changed, put in, taken out, or copied from elsewhere; now and then cut short."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at, other = (int(random.integers(len(changed) + 1)) for _ in range(2))
        length = int(random.integers(1, 60))
        kind = random.integers(6)
        if kind < 2:
            changed[at : at + 1] = random.bytes(1)
        elif kind == 2:
            changed[at:at] = random.bytes(length)
        elif kind == 3:
            changed[at : at + length] = changed[other : other + length]
        elif kind == 4:
            changed[at:at] = changed[other : other + length]
        else:
            del changed[at : at + (length if random.integers(20) else len(changed))]
    return bytes(changed)
