"""The part of a training file to convert: its EMA parameters, if it has any.

A part is found by what it holds, the tensors of a known network, whatever the file calls it. Its
name only says whether it is an average, the state of an optimizer, or raw parameters.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from dmf.checkpoints.convert.name_tables import Tensor, Tensors
from dmf.errors import InputError

# The part that is not below any name, as `--key` calls it.
TOP = "."
_SEPARATORS = re.compile(r"[./]")
# One word of a name, in snake_case or CamelCase.
_WORD = r"(?:(?<![a-zA-Z])|(?<=[a-z])(?=[A-Z]))(?i:{})\d*(?:(?![a-zA-Z])|(?=[A-Z]))"
_AVERAGE = re.compile(_WORD.format("ema|swa|avg|averaged?|shadow|polyak"))
_RAW = re.compile(_WORD.format("online|raw|backup|original|collected"))
_OPTIMIZER = re.compile(r"opt|optim|optimi[sz]ers?(_states?)?|opt_state|mu|nu|exp_avg(_sq)?|"
                        r"grads?|gradients?|scaler|lr_schedulers?", re.IGNORECASE)
# Parts in which other networks than the trained one are kept, as those of its loss.
_AUXILIARY = re.compile(r"loss|foundation_model")
# Tensors that the network computes by itself, which a list of trained parameters may leave out.
_FIXED = ("pos_embed",)
_WRAPPERS = ("module", "_orig_mod")
_SHOWN = 8


class Part(NamedTuple):
    """A part of a training file.

    Attributes:
      name: what precedes the names of its tensors, without the last separator; "" for a whole file.
      tensors: its tensors by the rest of their names, in the order of the file.
      note: one line for the user: which part it is, and why; "" for a whole file.
    """

    name: str
    tensors: Tensors
    note: str = ""


def choose_part(
    tensors: Tensors, networks: Collection[tuple[str, ...]], key: str = ""
) -> Part:
    """The part that is converted: the EMA parameters by default.

    Args:
      tensors: all tensors of a file by name, where "." or "/" separates the names of parts.
      networks: names of tensors that tell a network, for each known network.
      key: name of the part; empty for the EMA parameters if there are any; "." for the tensors
        below no part. A part within it is chosen in the same way.

    Returns:
      The part; the whole file where no known network is found.

    Raises:
      InputError: there is no such part, or several parts could be meant; the message lists them.
    """
    if key and key != TOP:
        tensors = _below(tensors, key)
    found = [name for name in _network_parts(tensors, networks) if not _is_beside(name)]
    if key == TOP:
        return Part(TOP, _without(tensors, found), f"part {TOP!r}")
    averages = [name for name in found if _is_average(name)]
    unnamed = [] if averages else _unnamed_averages(tensors)
    if unnamed and found:
        if len(found) > 1:
            raise _unknown_form(key, found, unnamed)
        return _in_order(tensors, found[0], unnamed, key)
    if len(averages or found) > 1:
        raise InputError("", remedy=f"several of its parts could be meant; give one of "
                         f"{_choices(key, found)}")
    name = (averages or found or [""])[0]
    return _named(tensors, name, found, key, "EMA" if averages else "")


def _below(tensors: Tensors, key: str) -> Tensors:
    """The tensors whose names begin with a key, by the rest of their names."""
    part = {name[len(key) + 1:]: tensor for name, tensor in tensors.items()
            if name.startswith((f"{key}.", f"{key}/"))}
    if not part:
        heads = sorted({_SEPARATORS.split(name)[0] for name in tensors})
        raise InputError("", remedy=f"it has no part {key!r} with tensors; it has "
                         f"{', '.join(heads[:_SHOWN]) or 'none'}")
    return part


def _network_parts(tensors: Tensors, networks: Collection[tuple[str, ...]]) -> list[str]:
    """What precedes the names of the tensors of a known network, in order, for each that is there.

    It ends with a separator, or is empty.
    """
    parts: set[tuple[str, frozenset[str]]] = set()
    for names in networks:
        prefixes = [{name.removesuffix(last) for name in tensors if name.endswith(last)}
                    for last in names]
        parts |= {(prefix, frozenset(prefix + name for name in names))
                  for prefix in set.intersection(*prefixes) if prefix[-1:] in ("", *"./")}
    # A network whose telling tensors are among those of another one is a part of that one.
    return sorted({part for part, told in parts if not any(told < other for _, other in parts)})


def _is_beside(name: str) -> bool:
    """Whether a part is the state of an optimizer, or of another network than the trained one."""
    words = _SEPARATORS.split(name)
    return any(_OPTIMIZER.fullmatch(word) or _AUXILIARY.fullmatch(word) for word in words)


def _is_average(name: str) -> bool:
    """Whether the last telling word of a name is one for an average."""
    for word in reversed(_SEPARATORS.split(name)):
        if _RAW.search(word) or _AVERAGE.search(word):
            return not _RAW.search(word)
    return False


def _unnamed_averages(tensors: Tensors) -> list[str]:
    """The parts that are called averages, and hold more than single numbers."""
    parts = set()
    for name, tensor in tensors.items():
        *words, last = _SEPARATORS.split(name)
        part = name.removesuffix(last)
        if tensor.shape and _is_average(part) and not any(map(_OPTIMIZER.fullmatch, words)):
            ends = [match.end() for match in _SEPARATORS.finditer(part)]
            shortest = next(part[:end] for end in ends if _is_average(part[:end]))
            parts.add(part if last.isdecimal() else shortest)
    return sorted(parts)


def _in_order(tensors: Tensors, raw: str, unnamed: list[str], key: str) -> Part:
    """A list of averages under the names of the raw parameters, whose order it has.

    Raises:
      InputError: there is no one list with the shapes of the raw parameters.
    """
    named = _named(tensors, raw, [raw], key, "").tensors
    trained = {name: tensor for name, tensor in named.items() if not name.endswith(_FIXED)}
    values = _as_list(tensors, unnamed)
    for names in (named, trained):
        if [tensor.shape for tensor in names.values()] == [value.shape for value in values]:
            full = _full_name(key, unnamed[0])
            note = f"part {full!r}, its EMA parameters, in the order of part {_shown(raw)!r}"
            return Part(full, {**named, **dict(zip(names, values, strict=True))}, note)
    raise _unknown_form(key, [raw], unnamed)


def _as_list(tensors: Tensors, unnamed: list[str]) -> list[Tensor]:
    """The tensors of a list of parameters; none if there are several parts, or it is no list."""
    (part, *others) = unnamed
    below = {name[len(part):]: tensor for name, tensor in tensors.items() if name.startswith(part)}
    is_list = list(below) == [str(i) for i in range(len(below))]
    return list(below.values()) if is_list and not others else []


def _named(tensors: Tensors, name: str, found: list[str], key: str, kind: str) -> Part:
    """The tensors of a part; of the whole file without the other parts for an empty name."""
    full = _full_name(key, name)
    if not name:
        return Part(full, _without(tensors, found), f"part {full!r}" if full else "")
    kind = kind and f", its {kind} parameters"
    none = "" if kind or key else "; no EMA parameters were found in it"
    part = {rest.removeprefix(name): tensor for rest, tensor in tensors.items()
            if rest.startswith(name)}
    return Part(full, part, f"part {full!r}{kind}{none}")


def _without(tensors: Tensors, parts: list[str]) -> Tensors:
    """The tensors that are in none of the parts."""
    others = tuple(part for part in parts if part)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}


def _full_name(key: str, part: str) -> str:
    """The name of a part within the part of a key, without the names of wrapping modules."""
    words = [word for word in _SEPARATORS.split(part) if word]
    while words and words[-1] in _WRAPPERS:
        words.pop()
    return ".".join(filter(None, [key, *words]))


def _shown(part: str) -> str:
    return part.rstrip("./") or TOP


def _choices(key: str, parts: list[str]) -> str:
    """What `--key` can be."""
    names = [_shown(f"{key}.{part}" if key else part) for part in parts[:_SHOWN]]
    return ", ".join(f"--key={name}" for name in names)


def _unknown_form(key: str, raw: list[str], unnamed: list[str]) -> InputError:
    return InputError("", remedy=f"its part {_shown(unnamed[0])!r} seems to hold EMA parameters in "
                      f"a form that is not known; give {_choices(key, raw)} for the raw parameters")
