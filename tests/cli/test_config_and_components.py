"""dmf config and dmf components: what they print, and that every field has a meaning."""

import ast
import dataclasses

import pytest
import tiny
from flax.traverse_util import flatten_dict

from configs import default
from dmf import registry
from dmf.default_config import Config


def printed(capsys, *arguments) -> list[str]:
    """The lines that a command prints."""
    capsys.readouterr()
    assert tiny.dmf(*arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def settings(lines: list[str]) -> dict[str, tuple[str, str]]:
    """(value, meaning) by field, from lines FIELD = VALUE  # MEANING."""
    parts = [line.partition("  #") for line in lines]
    pairs = [(setting.partition(" = "), meaning.strip()) for setting, _, meaning in parts]
    return {field: (value.strip(), meaning) for (field, _, value), meaning in pairs}


def test_config_prints_every_field_with_its_value(capsys):
    lines = printed(capsys, "config", f"--config={tiny.ROOT}/configs/default.py")
    found = settings(lines)
    config = flatten_dict(default.get_config().to_dict(), sep=".", keep_empty_nodes=True)
    config["data.mixture"] = {}
    assert set(found) == set(config)
    for field, (value, meaning) in found.items():
        assert ast.literal_eval(value) == config[field], field
        assert meaning, field


def test_config_prints_the_component_that_an_override_chooses(capsys):
    fields = ["--config.sampling.sampler.name=ctm", "--config.sampling.sampler.gamma=0.3",
              "--config.objective.interpolant=cosine", "--config.emas.slow.name=half_life"]
    found = settings(printed(capsys, "config", f"--config={tiny.CONFIG}", *fields))
    value, meaning = found["sampling.sampler.name"]
    assert value == "'ctm'" and "one of adams_bashforth, ctm, euler, heun, " in meaning
    assert found["sampling.sampler.gamma"][0] == "0.3"
    assert found["objective.interpolant"][0] == "'cosine'"
    assert found["emas.slow.ramp"][0] == "0.05"


def test_config_refuses_what_train_refuses(capsys):
    assert tiny.dmf("config", f"--config={tiny.CONFIG}", "--config.model.depht=3") == 2
    assert "did you mean depth?" in capsys.readouterr().err


def test_components_lists_every_component_and_field(capsys):
    text = "\n".join(printed(capsys, "components"))
    for kind, description in registry.kinds().items():
        assert f"{kind}: {description}" in text
        for name, component in registry.components(kind).items():
            assert f"\n  {name}: " in text, name
            for field in registry.config_fields(component) if isinstance(component, type) else ():
                assert f"\n    {field}" in text, field


def test_components_of_one_kind(capsys):
    lines = printed(capsys, "components", "sampler")
    assert lines[0] == "sampler: One step from t to t_next, from noise to data."
    assert any(line.startswith("    gamma = 0.5  # ") for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
    nested = "    time_pair = ordered_pair(first=logit_normal(mean=0.4"
    assert any(line.startswith(nested) for line in printed(capsys, "components", "objective"))
    assert tiny.dmf("components", "smapler") == 2
    assert "smapler: no such kind; choose one of " in capsys.readouterr().err


def test_components_of_a_plugin_are_listed(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._COMPONENTS, "ema", {**registry.components("ema")})
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import dataclasses\nfrom dmf.registry import register\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True)\n"
        "class Mine:\n    '''A mean of mine.\n\n    Attributes:\n      share: a number.\n    '''\n"
        "    share: float = 0.5\nregister('ema', mine=Mine)\n"
    )
    lines = printed(capsys, "components", f"--plugins={plugin}", "ema")
    listed = lines.index("  mine: A mean of mine.")
    assert lines[listed + 1] == "    share = 0.5  # a number."


def test_a_plugin_that_fails_is_one_line(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("x = 1\ny = x / 0\n")
    assert tiny.dmf("components", f"--plugins={tmp_path}/mine.py") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("mine.py: ZeroDivisionError: division by zero (line 2)")


def groups(cls: type = Config) -> dict[str, type]:
    """The dataclasses of sections and groups of fields below one, by name."""
    found = {cls.__name__: cls}
    for field in registry.config_fields(cls).values():
        kind = registry.field_kind(field)
        if isinstance(kind, type):
            found |= groups(kind)
    return found


CLASSES = groups()
for each in registry.kinds():
    for component in filter(lambda c: isinstance(c, type), registry.components(each).values()):
        if dataclasses.is_dataclass(component):
            CLASSES |= groups(component)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_field_of_a_config_has_a_meaning(name):
    docs = registry.field_docs(CLASSES[name])
    for field in registry.config_fields(CLASSES[name]):
        meaning = docs.get(field, "")
        assert len(meaning.split()) > 1, f"{name}.{field}: say under Attributes what it means"
        start = meaning.split()[0].lower()
        assert start not in ("of", "as", "after", "over", "at"), f"{name}.{field}: {meaning}"
