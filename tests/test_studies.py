"""The studies: equal compute, units that are done once, and verdicts that follow from numbers."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from benchmarks.studies import objectives, objectives_page, page, plan, study, units
from benchmarks.studies.plan import ABLATIONS, MEASURES, RUNS, STUDIES
from benchmarks.studies.study import Claim, Measure, Scale, Study
from dmf.models.build import network
from dmf.runtime.sharding import make_mesh
from dmf.training import build

WHOLE = Scale()
STEPS = sorted({steps for measure in MEASURES.values() for steps in measure.steps})


@pytest.mark.parametrize("run", RUNS)
def test_a_run_can_be(run, tmp_path):
    config = plan.config_of(run, tmp_path, 1, WHOLE)
    teacher = network(config.model) if config.teacher.checkpoint else None
    recipe = build.recipe(config, make_mesh(devices=jax.devices()[:1]), teacher)
    assert recipe.network.depth == 6
    assert config.optimizer.decay_steps in (0, config.run.steps), "it decays to the last step"
    assert config.seed == 1
    alone = run == "flow" or run in plan.FROM_SCRATCH
    assert config.init.checkpoint == ("" if alone else f"{tmp_path}/flow")


def test_each_fine_tuning_is_another():
    configs = [plan.config_of(run, pathlib.Path("x"), 0, WHOLE).to_json_best_effort()
               for run in plan.TUNED]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize("run", plan.FROM_SCRATCH)
def test_runs_from_scratch_cost_what_flow_model_and_fine_tuning_cost_together(run, tmp_path):
    config, flow, dmf = (plan.config_of(name, tmp_path, 0, WHOLE) for name in (run, "flow", "dmf"))
    step = plan._cost(config) / config.run.steps
    assert plan._cost(config) == pytest.approx(plan._cost(flow) + plan._cost(dmf), abs=step / 2)


@pytest.mark.slow
def test_the_two_networks_have_about_the_same_number_of_parameters(tmp_path):
    sizes = []
    for run in ("meanflow", "improved"):
        init = network(plan.config_of(run, tmp_path, 0, WHOLE).model).init
        params = jax.eval_shape(init, jax.random.key(0))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(params)))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize("factor", [0.01, 1.0])
def test_meanflow_costs_what_the_others_cost_together(factor, tmp_path):
    # Forward passes of a step: 3 for flow matching, 4 for MeanFlow, 7 for Decoupled MeanFlow.
    steps = {run: plan.config_of(run, tmp_path, 0, Scale(factor=factor)).run.steps
             for run in ("flow", "dmf", "meanflow")}
    others = 3 * steps["flow"] + 7 * steps["dmf"]
    # Whole steps, and the little that a second time embedding costs.
    assert 4 * steps["meanflow"] == pytest.approx(others, rel=0.01, abs=4)


@pytest.mark.parametrize("chosen", [ABLATIONS, objectives_page.COMPARISON])
def test_what_a_claim_compares_is_measured_and_shown(chosen):
    for part in chosen.studies.values():
        for claim in part.claims:
            for name in (claim.lower, *claim.higher):
                assert name in part.measures
                assert claim.steps in chosen.measures[name].steps
                assert chosen.measures[name].run in chosen.runs


@pytest.mark.parametrize("run", objectives.RUNS)
def test_every_objective_has_the_same_compute(run, tmp_path):
    config = objectives.config_of(run, tmp_path, 1, WHOLE)
    recipe = build.recipe(config, make_mesh(devices=jax.devices()[:1]), None)
    step = objectives.BATCH_SIZE * recipe.objective.flops(recipe.network)
    share = 0.5 if run == "flow" or run.endswith("_flow") else 1.0
    assert config.run.steps % objectives.PARTS == 0
    # Whole quarters of the steps.
    assert config.run.steps * step == pytest.approx(share * objectives.BUDGET, abs=2 * step)
    assert config.optimizer.decay_steps == config.run.steps == 4 * config.run.checkpoint_every
    assert config.init.checkpoint == (f"{tmp_path}/flow" if run.endswith("_flow") else "")


def test_a_curve_reaches_a_distance_between_two_evaluations():
    shares, values = np.array([0.25, 0.5, 0.75, 1.0]), np.array([8.0, 4.0, 1.0, 2.0])
    for target, share in ((9.0, 0.25), (4.0, 0.5), (2.0, 0.625), (1.0, 0.75), (0.5, None)):
        assert objectives_page.reached(shares, values, target) == share


def rows(**of_seeds):
    """Results with the same distance at every number of steps."""
    return {
        name: [{n: {page.METRIC: value, "label_agreement": 0.5} for n in STEPS} for value in values]
        for name, values in of_seeds.items()
    }


@pytest.mark.parametrize(
    ("lower", "said"),
    [([1.0, 1.0, 1.0], "holds"), ([3.0, 3.0, 3.0], "does not hold"), ([1.0, 3.0, 1.0], "open"),
     ([1.5, 2.0, 2.5], "does not hold")],
)  # fmt: skip
def test_a_direction_holds_where_it_does_in_every_seed(lower, said):
    claim = Claim(text="", lower="a", higher=("b", "c"))
    # The best of the others is 1.5, 2 and 2 in the three seeds.
    results = rows(a=lower, b=[1.5, 2.0, 9.0], c=[9.0, 9.0, 2.0])
    found = page.verdict(claim, results)
    assert found.startswith(f"**{said}** at 1 step, ")
    assert f"({np.mean(lower):.2f} against 1.83)" in found


def test_the_page_has_a_table_a_picture_and_a_verdict_for_each_study(tmp_path):
    folders = [tmp_path / f"seed_{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        folder.mkdir()
        for name, measure in MEASURES.items():
            results = [{"steps": n, page.METRIC: (1 + 2 * i) / n, "label_agreement": 0.9}
                       for n in measure.steps]
            (folder / f"{name}.json").write_text(json.dumps({
                "results": results, "count": 100, "reference": {"halves_distance": 0.25},
            }))  # fmt: skip
    output = tmp_path / "studies.md"
    page.write_page(ABLATIONS, output, folders, command="make", minutes=2.0, machine="a machine")
    text = output.read_text()
    for name, part in STUDIES.items():
        assert f"## {part.title}\n" in text
        assert (tmp_path / "studies" / f"{name}.png").exists()
    # Seeds of 1 and 3 at one step, 0.5 and 1.5 at two.
    assert "| Decoupled MeanFlow | 2.00 ± 1.41 (90%) | 1.00 ± 0.71 (90%) |" in text
    # Where all are equal nothing is closer.
    assert text.count("**does not hold**") == sum(len(s.claims) for s in STUDIES.values())


def test_units_are_done_once_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    done, fails = [], {"measure": "dmf"}

    def train(config, workdir):
        pathlib.Path(workdir).mkdir()
        (workdir / "step").write_text(str(config.run.steps))
        done.append(workdir.name)

    def evaluate(verb, arguments):
        given = dict(a.removeprefix("--").split("=", 1) for a in arguments)
        output = pathlib.Path(given["output"])
        if output.stem == fails["measure"]:
            raise KeyboardInterrupt
        step = int(pathlib.Path(given["checkpoint"], "step").read_text())
        output.write_text(json.dumps({"step": step, "count": int(given["count"])}))
        done.append(output.stem)

    def latest_step(workdir):
        file = workdir / "step"
        return int(file.read_text()) if file.exists() else None

    monkeypatch.setattr(units, "train", train)
    monkeypatch.setattr(units, "latest_step", latest_step)
    monkeypatch.setattr(units.evaluate, "main", evaluate)
    folder, small = tmp_path / "seed_0", Scale(factor=0.01)
    with pytest.raises(KeyboardInterrupt):
        units.run_units(ABLATIONS, folder, 0, small)
    fails.clear()
    fails["measure"] = ""
    units.run_units(ABLATIONS, folder, 0, small)
    everything = [*RUNS, *MEASURES]
    assert done == everything
    units.run_units(ABLATIONS, folder, 0, small)
    assert done == everything
    assert len((folder / units.TIMES).read_text().splitlines()) == len(everything)
    # Another number of samples is another measurement of the same runs.
    monkeypatch.setattr(study, "MIN_COUNT", 80)
    units.run_units(ABLATIONS, folder, 0, small)
    assert done[len(everything):] == list(MEASURES)


def test_a_part_of_a_run_is_measured_at_its_checkpoint(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(units, "latest_step", lambda workdir: 8)
    monkeypatch.setattr(units.evaluate, "main", lambda verb, arguments: calls.append(arguments))
    for share in (0.25, 1.0):
        measure = Measure(label="", run="a", share=share)
        assert units._evaluate("m", measure, tmp_path, 0, WHOLE)
        step = {"step": round(8 * share), "count": WHOLE.count}
        (tmp_path / "m.json").write_text(json.dumps(step))
        assert not units._evaluate("m", measure, tmp_path, 0, WHOLE)
    assert [call[0] for call in calls] == [f"--checkpoint={tmp_path}/a/checkpoints/2",
                                           f"--checkpoint={tmp_path}/a"]


def test_the_table_says_what_it_costs_to_reach_a_distance(monkeypatch):
    seeds, cost = [pathlib.Path("0"), pathlib.Path("1")], objectives_page.Cost
    costs = {"flow": cost(10, 3.0, 3e6, 1e12, 1.0), "mean_flow_flow": cost(20, 4.0, 4e6, 2e12, 0.5)}
    monkeypatch.setattr(objectives_page, "cost_of", lambda folder, run: costs[run])
    monkeypatch.setattr(objectives_page, "RUNS", {run: objectives.RUNS[run] for run in costs})
    results = rows(flow=[9.0, 9.0], mean_flow_flow_1=[4.0, 9.0], mean_flow_flow_2=[4.0, 9.0],
                   mean_flow_flow_3=[3.0, 9.0], mean_flow_flow=[2.0, 4.0])
    lines = objectives_page.table(seeds, results).splitlines()
    costs = "3.00 | 3.0 | 10 | 1000 | 1.00 |  |  |  |  |"
    assert lines[2] == f"| flow model, half of the compute | {costs}"
    # To 4: a quarter of the run in one seed and all of it in the other, after the flow model.
    assert lines[3].endswith("| 2.25 (16 s) | 3.00 (20 s, in 1 of 2 seeds) | - |")


@pytest.mark.slow
def test_real_units_make_a_page(tmp_path, monkeypatch):
    small = tiny.config({"data.batch_size": 8, "evaluation.chunk_size": 24})
    monkeypatch.setattr(plan.digits_sit, "get_config", small.copy_and_resolve_references)
    as_flow_map = {"model.conditioning": "decoupled", "model.split_depth": 1}
    measures = {
        name: Measure(label=name, run="flow", steps=(1,), overrides=overrides)
        for name, overrides in (("flow", {}), ("untrained", as_flow_map))
    }
    claim = Claim(text="a claim", lower="untrained", higher=("flow",))
    one = Study(title="One", text="", measures=tuple(measures), claims=(claim,))
    made = dataclasses.replace(ABLATIONS, runs=("flow",), measures=measures, studies={"one": one})
    folder = tmp_path / "seed_0"
    units.run_units(made, folder, 0, Scale(factor=0.01))
    output = tmp_path / "page.md"
    page.write_page(made, output, [folder], command="make", minutes=0.0, machine="a machine")
    text = (tmp_path / "page.md").read_text()
    assert "- a claim: **" in text
    distances = [json.loads((folder / f"{name}.json").read_text())["results"][0][page.METRIC]
                 for name in measures]
    assert distances[0] != distances[1]
    assert f"| untrained | {distances[1]:.2f} ± 0.00 (" in text
