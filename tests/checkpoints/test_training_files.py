"""Which part of a training file is converted: its average, whatever it is called."""

import numpy as np
import pytest

from dmf.checkpoints.convert.training_files import choose_part
from dmf.errors import InputError

# A network of three tensors, of which the first two tell it.
NETWORK = (("in.weight", "out.weight"),)
SHAPES = {"in.weight": (3, 2), "out.weight": (2, 3), "out.bias": (2,)}


def network(part: str, value: float, separator: str = ".") -> dict[str, np.ndarray]:
    """The tensors of the network in a part, all of one value."""
    prefix = part and part + separator
    return {prefix + name: np.full(shape, value) for name, shape in SHAPES.items()}


def listed(part: str, value: float, shapes=tuple(SHAPES.values())) -> dict[str, np.ndarray]:
    """The parameters of the network as a list."""
    return {f"{part}.{i}": np.full(shape, value) for i, shape in enumerate(shapes)}


RAW, AVERAGE = 1.0, 2.0
NUMBERS = {"decay": np.float64(0.9), "num_updates": np.int64(3)}
# Names of the raw part and of the average, as published training code has them.
NAMES = [
    ("model", "ema"), ("model", "ema_model"), ("state_dict", "ema_state_dict"),
    ("model", "ema.shadow"), ("model", "ema.state_dict"), ("model", "model_ema"),
    ("state_dict", "state_dict_ema"), ("state_dict.model", "state_dict.ema_model"),
    ("state_dict.net", "state_dict.net_ema"), ("online_model", "ema_model.module"),
    ("ema.online_model", "ema.ema_model"), ("model.module", "swa_model.module"),
    ("", "ema"), ("net", "averaged"), ("params", "params_ema"), ("generator", "modelEMA"),
    ("model._orig_mod", "ema._orig_mod"), ("ema.backup", "ema.shadow"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "average"), NAMES)
def test_the_average_is_taken_and_said(raw, average):
    optimizer = network("optimizer.state.exp_avg", 3.0)
    for parts in ((raw, RAW), (average, AVERAGE)), ((average, AVERAGE), (raw, RAW)):
        tensors = {**network(*parts[0]), **network(*parts[1]), **optimizer}
        chosen = choose_part(tensors, NETWORK)
        assert {name: w.flat[0] for name, w in chosen.tensors.items()} == dict.fromkeys(SHAPES, 2)
        name = average.removesuffix(".module").removesuffix("._orig_mod")
        assert chosen.name == name and f"part {name!r}, its EMA parameters" in chosen.note
    assert choose_part(tensors, NETWORK, raw or ".").tensors["out.bias"][0] == RAW


def test_paths_of_jax_are_names_too():
    tensors = network("params/params", RAW, "/") | network("ema_params/params", AVERAGE, "/")
    tensors |= network("opt_state/0/mu", 3.0, "/") | {"step": np.int32(9)}
    assert choose_part(tensors, NETWORK).tensors["out.bias"][0] == AVERAGE
    assert choose_part(tensors, NETWORK, "params").tensors["out.bias"][0] == RAW


@pytest.mark.parametrize("tensors", [
    network("model", RAW) | {f"ema.{name}": number for name, number in NUMBERS.items()},
    network("model", RAW) | network("optimizer.exp_avg", 3.0),
    network("model", RAW) | {"schema.a": np.ones(2)},
])  # fmt: skip
def test_raw_parameters_are_taken_where_there_is_no_average(tensors):
    chosen = choose_part(tensors, NETWORK)
    assert chosen.name == "model" and chosen.tensors["out.bias"][0] == RAW
    assert "no EMA parameters were found" in chosen.note


def test_a_file_of_one_network_is_taken_whole():
    tensors = network("", RAW) | {"stray": np.ones(2)}
    assert choose_part(tensors, NETWORK) == ("", tensors, "")
    assert choose_part({"stray": np.ones(2)}, NETWORK).tensors.keys() == {"stray"}


@pytest.mark.parametrize("fixed", [False, True])
def test_a_list_of_averages_has_the_order_of_the_raw_parameters(fixed):
    """A table that is not trained may be missing from the list."""
    tensors = {"model.pos_embed": np.zeros((1, 4))} if fixed else {}
    tensors |= network("model", RAW) | listed("ema.shadow_params", AVERAGE)
    tensors |= {"ema.decay": NUMBERS["decay"]}
    chosen = choose_part(tensors, NETWORK)
    assert {name: w.flat[0] for name, w in chosen.tensors.items()} == (
        {"pos_embed": 0.0} if fixed else {}) | dict.fromkeys(SHAPES, AVERAGE)
    assert chosen.note == (
        "part 'ema.shadow_params', its EMA parameters, in the order of part 'model'")
    assert choose_part(tensors, NETWORK, "model").tensors["out.bias"][0] == RAW


UNCLEAR = {
    "another order": (
        network("model", RAW) | listed("ema.shadow_params", AVERAGE, [(2,), (3, 2), (2, 3)]),
        "its part 'ema.shadow_params' seems to hold EMA parameters in a form that is not known; "
        "give --key=model for the raw parameters",
    ),
    "fewer": (
        network("model", RAW) | listed("ema.shadow_params", AVERAGE, [(3, 2), (2, 3)]),
        "its part 'ema.shadow_params' seems",
    ),
    "two lists": (
        network("model", RAW) | listed("ema.shadow_params", 2.0) | listed("swa.shadow_params", 3.0),
        "its part 'ema.shadow_params' seems",
    ),
    "names without dots": (
        network("model", RAW) | {"model_ema.inweight": np.ones((3, 2))},
        "its part 'model_ema' seems",
    ),
    "an average of something else": (
        network("", RAW) | {"ema.in.weight": np.ones((3, 2))}, "give --key=. for the raw",
    ),
    "two averages": (
        network("model", RAW) | network("ema_1", 2.0) | network("ema_2", 3.0),
        "several of its parts could be meant; give one of --key=ema_1, --key=ema_2",
    ),
    "two networks": (
        network("student", RAW) | network("teacher", 2.0), "one of --key=student, --key=teacher",
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_cannot_be_told_is_asked_for(case):
    tensors, message = UNCLEAR[case]
    with pytest.raises(InputError) as error:
        choose_part(tensors, NETWORK)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_part_that_is_not_there():
    with pytest.raises(InputError, match="it has no part 'swa' with tensors; it has ema, model"):
        choose_part(network("model", RAW) | network("ema", AVERAGE), NETWORK, "swa")
    with pytest.raises(InputError, match="--key=ema.a, --key=ema.b"):
        choose_part(network("ema.a", RAW) | network("ema.b", AVERAGE), NETWORK, "ema")
