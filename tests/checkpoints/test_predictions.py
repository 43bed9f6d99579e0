"""DiT predicts noise, SiT the velocity, and their tensors have the same names and shapes."""

import golden_values as gv
import numpy as np
import pytest
from test_convert import TINY, tensors_of

from dmf.checkpoints.convert import namings, predictions
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.checkpoints.convert.tables import dit
from dmf.errors import InputError
from dmf.models.dit import DiT


def files() -> dict[str, dict[str, np.ndarray]]:
    """Tensors of SiT, whose unused channels are zero, and of DiT, which learns variances there."""
    of_dit = tensors_of(DiT(**TINY), dit.sit_table)
    params = dit.from_pytorch(DiT(**TINY), tensors_of(DiT(**TINY), dit.pytorch_table))
    of_sit = namings.to_named_tensors(DiT(**TINY), params, namings.naming_of(DiT(**TINY), "sit"))
    return {"sit": of_sit, "dit": of_dit, "dmf": tensors_of(DiT(**TINY), dit.pytorch_table)}


FILES = files()
SIT, DIT = {"args.model": "SiT-XL/2"}, {"args.model": "DiT-XL/2"}
NOISE = {"args.model": "SiT-XL/2", "args.prediction": "noise"}
VELOCITY = {"args.model": "DiT-XL/2", "args.prediction": "velocity"}
CANNOT = "which predicts noise and cannot be converted, and nothing in it tells"
OTHER = "args.prediction=noise: the network does not predict the velocity"
NAMED = "args.model=DiT-XL/2: DiT predicts noise, which cannot be converted"


@pytest.mark.parametrize(("file", "settings", "naming", "message"), [
    ("sit", {}, "", ""),
    ("sit", SIT, "", ""),
    ("sit", DIT, "", NAMED),
    ("sit", DIT, "sit", ""),
    ("dit", {}, "", CANNOT),
    ("dit", {}, "sit", ""),
    ("dit", SIT, "", ""),
    ("dit", DIT, "", NAMED),
    ("dit", NOISE, "", OTHER),
    ("dit", NOISE, "sit", OTHER),
    ("dit", VELOCITY, "", ""),
    ("dmf", {}, "", ""),
    ("dmf", {"args.prediction": "v"}, "", ""),
    ("dmf", {"hyper_parameters.parameterization": "eps"}, "", "parameterization=eps: the network"),
    ("dmf", DIT, "", NAMED),
    ("dmf", DIT, "dmf", ""),
])  # fmt: skip
def test_a_network_that_may_predict_noise_is_not_taken_for_a_flow(file, settings, naming, message):
    def convert():
        return namings.from_named_tensors(
            FILES[file], {"heads": 2}, naming=naming, settings=settings
        )

    if not message:
        assert convert().naming.name == (naming or ("dmf" if file == "dmf" else "sit"))
        return
    with pytest.raises(InputError) as error:
        convert()
    assert message in str(error.value)
    assert ("--naming=" in str(error.value)) == (message is not OTHER and "eps" not in message)


def test_settings_are_found_where_training_stores_them():
    opened = open_checkpoint(str(gv.FOLDER / "forms_zip.pt"), "model")
    assert opened.settings == {"args.model": "DMFT-XL/2"}
    assert predictions.settings({"model": "vgg", "args.data": "v", "a.b.prediction": "v"}) == {
        "a.b.prediction": "v"
    }
