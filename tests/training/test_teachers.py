"""Teachers that a run cannot learn from are named before anything is written."""

import pytest
import tiny

from configs import default
from dmf.errors import InputError
from dmf.models.build import network as build_network
from dmf.objectives import DecoupledMeanFlow, TeacherGuidance
from dmf.runtime.sharding import make_mesh
from dmf.training import build
from dmf.training.loop import train


def distilled(fields=None):
    """A flow map that learns from a teacher, by default one that it can learn from."""
    config = tiny.flow_map({"teacher.checkpoint": str(tiny.flow_run()), **(fields or {})})
    config.objective = default.component(DecoupledMeanFlow(guidance=TeacherGuidance(scale=1.5)))
    return config


def other(**fields):
    """The network of a teacher that differs in some fields."""
    config = tiny.config({f"model.{name}": value for name, value in fields.items()})
    return build_network(config.model)


@pytest.mark.parametrize(("fields", "message"), [
    ({"channels": 4, "input_size": 16},
     r"its samples have shape \(16, 16, 4\), those of config.model \(8, 8, 1\)"),
    ({"num_classes": 3}, "it has 3 classes; model.num_classes=10 must be the same"),
    ({"num_classes": 0}, "it has 0 classes; model.num_classes=10 must be the same"),
])  # fmt: skip
def test_a_teacher_of_other_samples_or_labels_is_refused(fields, message):
    with pytest.raises(InputError, match=f"teacher.checkpoint=.*: {message}"):
        build.recipe(distilled(), make_mesh(), other(**fields))


def test_a_teacher_of_the_same_samples_may_have_another_architecture():
    teacher = other(depth=3, width=16, heads=1, conditioning="meanflow")
    assert build.recipe(distilled(), make_mesh(), teacher).objective.teacher == teacher


@pytest.mark.parametrize(("field", "value", "theirs"), [
    ("objective.interpolant", "cosine", "linear"), ("latents.scale", 0.5, "1.0"),
    ("latents.shift", 0.1, "0.0"),
])  # fmt: skip
def test_a_teacher_of_another_path_or_other_latents_is_refused(field, value, theirs, tmp_path):
    config = distilled()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=f"^{field}=.*was trained with {theirs}, and must be"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_which_nothing_is_asked_is_refused():
    config = tiny.flow_map({"teacher.checkpoint": str(tiny.flow_run())})
    with pytest.raises(InputError, match=r"^teacher.checkpoint=.*guidance.name=teacher, or leave"):
        build.training(config)


def test_without_a_teacher_there_is_nothing_to_learn_from():
    with pytest.raises(InputError, match=r"^teacher.checkpoint=: .*=teacher needs the directory"):
        build.training(distilled({"teacher.checkpoint": ""}))
