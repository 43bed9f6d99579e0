"""Exports on the Hugging Face hub, on a stand-in for it: pushed, and used as checkpoints."""

import json
import pathlib
import re
import shlex
import shutil
import sys

import hub_stand_in
import pytest
import small_network
import tiny
import tiny_exports
import yaml
from small_export import NETWORK, PARAMS, evaluation, parts

import dmf
from dmf.checkpoints import export, hub_card, load, located, model_card
from dmf.checkpoints.push import push
from dmf.cli import evaluate_call
from dmf.errors import InputError, RunError
from dmf.models.build import network
from dmf.runtime import hub_upload
from dmf.runtime.checksums import fingerprint
from dmf.runtime.ownership import owned_output
from dmf.training.initial_checkpoint import inherit
from dmf.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network_registered")

PUBLICATION = hub_card.Publication(repository="me/maps", license="mit")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories."""
    made = hub_stand_in.Hub(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made.module())
    located.look_again()
    yield made
    located.look_again()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of a small flow model."""
    folder = tmp_path_factory.mktemp("exports") / "small"
    export.write(folder, parts())
    return folder


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


def put(hub, name: str, files: dict[str, bytes]) -> str:
    """Adds a commit to a repository; returns it."""
    return hub.repositories.setdefault(name, hub_stand_in.Repository()).commit(files)


def code(card: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", card, re.DOTALL)[1]


def refused(capsys, *arguments) -> str:
    assert tiny.dmf("export", *arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# Pushed.


def test_the_card_of_a_pushed_export_runs_as_written(hub, exported, tmp_path, capsys):
    (exported / "evaluation.json").write_text(evaluation())
    assert tiny.dmf("export", f"--checkpoint={exported}", "--push=me/maps", "--license=mit",
                    "--datasets=me/digits", "--commit-message=First", "--private") == 0
    repository = hub.repositories["me/maps"]
    assert repository.private and repository.commits[-1][1] == "First"
    assert capsys.readouterr().out == f"https://hub/me/maps/commit/{repository.newest}\n"
    _, header, card = repository.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "license": "mit", "library_name": "dmf", "pipeline_tag": "unconditional-image-generation",
        "datasets": ["me/digits"], "tags": ["jax", "image-generation", "class-conditional"],
        "metrics": ["fd_pixels"],
        "model-index": [{"name": "maps", "results": [{
            "task": {"type": "unconditional-image-generation"},
            "dataset": {"name": "digits", "type": "digits"},
            "metrics": [{"type": "fd_pixels", "value": 0.12346,
                         "name": "Frechet distance, 2 steps",
                         "args": {"steps": 2, "count": 72, "protocol": "pixels"}}],
        }]}],
    }  # fmt: skip
    names = {}
    exec(code(card, "python"), names)
    assert names["images"].shape == (4, *NETWORK.sample_shape)
    assert fingerprint(names["flow_map"].params) == fingerprint(PARAMS)
    assert b"/home/me" not in b"".join(repository.files.values())


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["flow", "decoupled"])
def test_the_card_of_a_network_over_latents_runs_as_written(
    hub, tmp_path, monkeypatch, conditioning
):
    fields = {"model.channels": 4, "model.depth": 2, "model.width": 8, "model.heads": 1,
              "model.conditioning": conditioning, "sampling.shift": 1.5,
              "model.split_depth": 1 if conditioning == "decoupled" else None}  # fmt: skip
    config, vae = tiny.config(fields), tiny_exports.AUTOENCODER
    decoder = export.Parts(vae, load.export_config(vae, {}), tiny_exports.params(vae), "drawn")
    flow = network(config.model)
    export.write(tmp_path / "local", export.Parts(
        flow, load.config_to_json(config), tiny_exports.params(flow), "drawn", decoder))
    for form in ("orbax", "safetensors"):
        assert tiny.dmf("export", f"--checkpoint={tmp_path}/local", f"--format={form}",
                        f"--push=me/{form}", "--license=mit") == 0
    card = hub.repositories["me/orbax"].files["README.md"].decode()
    assert ("flow-map" in card.split("---\n")[1]) == (conditioning == "decoupled")
    names = {}
    exec(code(card, "python"), names)
    assert names["images"].shape == (4, 32, 32, 3) and "shift=1.5" in card
    monkeypatch.chdir(tmp_path)
    for form in ("orbax", "safetensors"):
        card = hub.repositories[f"me/{form}"].files["README.md"].decode()
        _, verb, *arguments = shlex.split(code(card, "bash"))
        assert tiny.dmf(verb, *arguments, *["--count=2"] * (verb == "sample")) == 0
    assert (tmp_path / "samples.png").exists()
    assert (tmp_path / "export/autoencoder/params").exists()


def test_what_is_said_of_a_network_on_the_hub():
    config = load.config_to_json(tiny.config({"init.checkpoint": "hf:them/base@v1"}))
    publication = hub_card.Publication(repository="me/x", license="other")
    data = yaml.safe_load(hub_card.header(config, publication).strip("-\n"))
    assert data["base_model"] == "them/base"
    assert data["tags"] == ["jax", "image-generation", "flow-matching", "class-conditional"]
    assert "model-index" not in data
    config["init"]["checkpoint"], config["model"]["num_classes"] = "runs/base", 0
    config["model"]["conditioning"] = "decoupled"
    data = yaml.safe_load(hub_card.header(config, publication).strip("-\n"))
    assert "base_model" not in data and data["tags"] == ["jax", "image-generation", "flow-map"]
    encoder = {"encoder": {"name": "inception"}}
    data = yaml.safe_load(hub_card.header(encoder, publication).strip("-\n"))
    assert data == {"license": "other", "library_name": "dmf", "tags": ["jax", "encoder"]}
    assert "take it as `hf:me/x`" in model_card.orbax_usage(encoder, publication, latents=False)
    config["objective"]["interpolant"] = {"name": "scaled_linear", "noise_scale": 2.0}
    assert "dmf.sample(" not in model_card.orbax_usage(config, publication, latents=False)


def test_another_push_replaces_the_export_and_leaves_other_files(hub):
    stale = {"config.json": b'{"format": 2}', "params/d/old": b"1", "autoencoder/params/x": b"1"}
    put(hub, "me/maps", stale | {"figure.png": b"mine", "params.txt": b"mine"})
    push(parts(), PUBLICATION)
    files = hub.repositories["me/maps"].files
    assert {path.partition("/")[0] for path in files} == {
        "README.md", "checksums.json", "config.json", "figure.png", "params", "params.txt"}
    assert "params/d/old" not in files and json.loads(files["config.json"])["origin"] == "drawn"
    assert len(hub.repositories["me/maps"].commits) == 3


@pytest.mark.parametrize(("files", "named"), [
    (["config.json"], "config.json"), (["model.safetensors"], "model.safetensors"),
    (["README.md", "params/a/b"], "README.md"), (["README.md", "model.bin"], "README.md"),
    (["autoencoder/x", "figure.png"], "autoencoder/x"),
])
def test_a_repository_of_another_project_is_left_alone(hub, files, named):
    put(hub, "me/maps", dict.fromkeys(files, b'{"model_type": "bert"}'))
    with pytest.raises(InputError, match=f"^push=me/maps: its {named} is of another project, and"):
        push(parts(), PUBLICATION)
    assert len(hub.repositories["me/maps"].commits) == 2


def test_a_model_card_alone_is_replaced_and_a_public_repository_is_not_taken(hub):
    put(hub, "me/maps", {"README.md": b"---\nlicense: mit\n---", ".gitattributes": b""})
    with pytest.raises(InputError, match=r"^private=True: me/maps is public; make it private in"):
        hub_upload.open_repository("me/maps", private=True)
    push(parts(), PUBLICATION)
    assert b"library_name: dmf" in hub.repositories["me/maps"].files["README.md"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--push=maps", "--license=mit"], "push=maps: give OWNER/REPO in letters"),
        (["--push=me/a--b", "--license=mit"], "push=me/a--b: give OWNER/REPO"),
        (["--push=hf:me/x", "--license=mit"], "push=hf:me/x: give OWNER/REPO"),
        (["--push=me/x"], "license=: give the licence of the parameters as the hub names it: "
         "apache-2.0, mit, cc-by-nc-4.0; other or unknown"),
        (["--push=me/x", "--license=Apache 2.0"], "license=Apache 2.0: give the licence of the "
         "parameters as the hub names it: apache-2.0"),
        (["--push=me/x", "--license=mit", "--datasets=digits"], "datasets=digits: give OWNER/DATA"),
        (["--push=me/x", "--license=mit", "--output=y"], "--output=y: --push leaves no directory"),
        (["--output=y", "--license=mit"], "--license=mit: it is for --push; leave it out"),
        (["--output=y", "--private"], "--private=True: it is for --push; leave it out"),
        (["--output=hf:me/x"], "output=hf:me/x: give a local path; "),
    ],
)  # fmt: skip
def test_a_push_that_cannot_be(hub, exported, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, f"--checkpoint={exported}", *arguments)
    assert not hub.repositories and [path.name for path in tmp_path.iterdir()] == []


def test_what_a_push_needs_is_checked_before_anything_is_loaded(hub, monkeypatch, capsys):
    command = ["--checkpoint=nowhere", "--push=me/x", "--license=mit"]
    hub.token = None
    assert "push=me/x: there is no token; log in with hf auth login" in refused(capsys, *command)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "push=me/x: it needs huggingface_hub (pip install it)" in refused(capsys, *command)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (hub_stand_in.HfHubHTTPError(401), "push=me/x: the token is not valid; log in"),
        (hub_stand_in.HfHubHTTPError(403), "push=me/x: the token gives no access to it"),
        (ValueError("bad yaml"), "push=me/x: the hub refuses it (ValueError: bad yaml)"),
        (ConnectionError("no\nroute"), "push=me/x: the hub cannot be reached, or failed "
         "(ConnectionError: no route); nothing was changed there, run the same command again"),
    ],
)  # fmt: skip
def test_the_hub_refuses_a_push(hub, tmp_path, failure, words):
    hub.failure = failure
    error = RunError if isinstance(failure, ConnectionError) else InputError
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        hub_upload.open_repository("me/x", private=False)
    repository = hub_upload.Repository("me/x", "", ())
    with pytest.raises(error, match=f"^{re.escape(words)}"):
        hub_upload.upload(tmp_path, repository, message="m", replaces=bool)


def test_a_card_has_no_score_of_a_checkpoint_that_is_saved_meanwhile(
    hub, tmp_path, monkeypatch, capsys
):  # fmt: skip
    run, load_params = tmp_path / "run", load.load_params
    shutil.copytree(small_network.run(), run)
    later = (run / "checkpoints/8").rename(tmp_path / "8")
    (run / "evaluation.json").write_text(evaluation(step=8))

    def and_saves(*arguments, **options):
        params = load_params(*arguments, **options)
        later.rename(run / "checkpoints/8")
        return params

    monkeypatch.setattr(load, "load_params", and_saves)
    assert tiny.dmf("export", f"--checkpoint={run}", "--push=me/maps", "--license=mit") == 0
    assert "it is of step 8, and the checkpoint of 4; the model card" in capsys.readouterr().err
    assert "objective, 4 steps of" in hub.repositories["me/maps"].files["README.md"].decode()


# Used as checkpoints.


def test_a_repository_is_downloaded_as_one_commit_and_looked_for_by_each_call(hub, exported):
    files, (_, config) = files_of(exported), dmf.load(exported)
    first = put(hub, "me/maps", files | {"video.mp4": b"large"})
    flow_map, its_config = dmf.load("hf:me/maps")
    assert fingerprint(flow_map.params) == fingerprint(PARAMS)
    assert its_config == config
    assert set(hub.downloaded) == files.keys() - {"README.md", "evaluation.json"}
    put(hub, "me/maps", {"README.md": b"", "model.pt": b""})
    assert load.read_config("hf:me/maps").model.hidden == NETWORK.hidden
    with pytest.raises(InputError, match="^checkpoint=hf:me/maps: it holds no export of dmf, but"):
        dmf.load("hf:me/maps")
    assert dmf.load(f"hf:me/maps@{first}")[1] == config


def test_a_push_during_a_download_is_not_mixed_in(hub, monkeypatch):
    put(hub, "me/maps", {"config.json": b"1", "params/x": b"1"})
    download = hub.hf_hub_download

    def slow_download(*arguments, **options):
        path = download(*arguments, **options)
        put(hub, "me/maps", {"config.json": b"2", "params/x": b"2"})
        return path

    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", slow_download)
    folder = located.local_directory("hf:me/maps")
    assert (folder / "config.json").read_text() == (folder / "params/x").read_text() == "1"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors": b"", "unet/model.bin": b"", "a.pt": b"", "b.pt": b""},
         "it holds no export of dmf, but a.pt, b.pt, model.safetensors, ...; make one with dmf "
         "convert hf:me/x/a.pt --output=DIR"),
        ({"config.json": b"{}", "vae/model.safetensors": b""}, "it holds no export of dmf, but "
         "vae/model.safetensors; make one with dmf convert hf:me/x/vae/model.safetensors"),
        ({"config.json": b"{}", "checkpoints/600/x": b""}, "it holds a run and no export"),
        ({"config.json": b"{}", "sample.stablehlo": b"", "weights.safetensors": b""},
         "it holds a StableHLO function, which its model card shows how to run"),
        ({"config.json": b"{}"}, "it holds no export of dmf, and no weights"),
    ],
)  # fmt: skip
def test_what_is_no_export_is_named(hub, files, words):
    put(hub, "me/x", files)
    with pytest.raises(InputError, match=f"^checkpoint=hf:me/x: {re.escape(words)}"):
        located.local_directory("hf:me/x")


@pytest.mark.parametrize(
    ("source", "failure", "words"),
    [
        ("hf:me", None, "give hf:OWNER/REPO or hf:OWNER/REPO@REVISION"),
        ("hf:me/x/model.pt", None, "give hf:OWNER/REPO or hf:OWNER/REPO@REVISION; of a file"),
        ("hf:me/y", None, "there is no such repository, or it is private; check the name"),
        ("hf:me/x@v2", None, "the repository has no such revision"),
        ("hf:me/x", hub_stand_in.GatedRepoError(), "its owner grants access on request"),
        ("hf:me/x", hub_stand_in.HfHubHTTPError(401), "the token is not valid"),
        ("hf:me/x", hub_stand_in.LocalEntryNotFoundError("no\nnetwork"), "it cannot be downloaded "
         "(LocalEntryNotFoundError: no network); without a network, give a folder"),
    ],
)  # fmt: skip
def test_a_repository_that_cannot_be_had(hub, source, failure, words):
    put(hub, "me/x", {})
    hub.failure = failure
    with pytest.raises(InputError, match=f"^checkpoint={source}: {re.escape(words)}"):
        located.local_directory(source)


def test_the_extra_is_named(monkeypatch):
    located.look_again()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"^checkpoint=hf:me/x: it needs huggingface_hub"):
        load.read_config("hf:me/x")


def test_a_run_starts_from_a_repository(hub, exported):
    put(hub, "me/maps", files_of(exported))
    config = small_network.config({"latents.scale": 2.0, "init.checkpoint": "hf:me/maps"})
    made, taken = inherit(config, ())
    assert made.init.checkpoint == "hf:me/maps" and taken == ["latents.scale=1.0"]
    config.init.checkpoint = "hf:me/none"
    with pytest.raises(InputError, match=r"^init.checkpoint=hf:me/none: there is no such rep"):
        inherit(config, ())
    with pytest.raises(InputError, match=r"^ema=std=0.1: hf:me/maps|^ema=std=0.1: .*is no run"):
        load.check_params("hf:me/maps", "std=0.1")


def test_nothing_is_written_beside_a_repository(hub, exported):
    put(hub, "me/maps", files_of(exported))
    with pytest.raises(InputError, match=r"^--output: it must be given for a checkpoint of the H"):
        evaluate_call.evaluate("hf:me/maps", steps=1)
    assert hub.downloaded == []
    with pytest.raises(InputError, match=r"^workdir=hf:me/maps: give a local path"):
        train(small_network.config(), "hf:me/maps")
    with pytest.raises(InputError, match=r"^--output=hf:me/maps: give a local path"):
        with owned_output("--output", "hf:me/maps"):
            pass


@pytest.mark.slow
def test_commands_take_a_repository(hub, exported, tmp_path):
    """Each command that takes a checkpoint does with a repository what it does with an export."""
    put(hub, "me/maps", files_of(exported))
    made = {}
    for name, checkpoint in (("local", exported), ("remote", "hf:me/maps")):
        folder = tmp_path / name
        assert tiny.dmf("sample", f"--checkpoint={checkpoint}", "--steps=2", "--count=4",
                        f"--output={folder}.npz") == 0
        assert tiny.dmf("sample", f"--checkpoint={exported}", f"--guide={checkpoint}", "--count=4",
                        "--config.sampling.guidance.scale=2", f"--output={folder}_g.npz") == 0
        assert tiny.dmf("evaluate", f"--checkpoint={checkpoint}", "--steps=1",
                        f"--output={folder}.json") == 0
        assert tiny.dmf("convert", checkpoint, f"--output={folder}") == 0
        assert tiny.dmf("train", f"--config={small_network.CONFIG}", f"--workdir={folder}_run",
                        f"--config.init.checkpoint={checkpoint}", "--config.run.steps=2") == 0
        state = load.load(f"{folder}_run", ema="")[0].params
        results = json.loads(folder.with_suffix(".json").read_text())["results"]
        made[name] = [fingerprint(load.load(folder)[0].params), fingerprint(state), results,
                      *(path.read_bytes() for path in sorted(tmp_path.glob(f"{name}*.npz")))]
    assert made["local"] == made["remote"]
    assert tiny.dmf("export", f"--checkpoint={tmp_path}/remote_run", "--push=me/tuned",
                    "--license=mit") == 0
    assert "base_model: me/maps\n" in hub.repositories["me/tuned"].files["README.md"].decode()
