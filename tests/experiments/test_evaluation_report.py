"""A report: the table holds every number, the picture is one, and other files are refused."""

import json

import PIL.Image
import pytest
import tiny

from dmf.errors import InputError
from dmf.experiments import evaluation_report


def evaluation(distances, agreement=None):
    extra = {} if agreement is None else {"label_agreement": agreement}
    rows = [{"ema": "main", "steps": n, "count": 5000, "fd_pixels": d, **extra}
            for n, d in distances.items()]
    return {
        "protocol": {"name": "pixels", "metrics": ["fd_pixels"]},
        "reference": {"name": "digits", "halves_distance": 0.28},
        "results": rows,
    }


FLOW = evaluation({1: 5.854, 4: 0.7})
MAP = evaluation({1: 0.476, 2: 0.27}, agreement=0.934)


def test_a_table_has_a_row_an_evaluation_and_a_column_a_number_of_steps():
    lines = evaluation_report.markdown_table({"flow": FLOW, "map": MAP}, "fd_pixels").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0][1:] == ["1 step", "2 steps", "4 steps"]
    assert cells[2] == ["flow", "5.85", "", "0.70"]
    assert cells[3] == ["map", "0.48 (93%)", "0.27 (93%)", ""]
    assert lines[-2] == "Protocol pixels, 5,000 samples, against digits."
    assert "0.28" in lines[-1]


def test_a_name_may_hold_what_separates_columns():
    table = evaluation_report.markdown_table({"a|b": FLOW}, "fd_pixels")
    assert "| a\\|b | " in table


def test_a_name_that_is_given_twice_is_refused(tmp_path, capsys):
    (tmp_path / "flow.json").write_text(json.dumps(FLOW))
    arguments = [f"a={tmp_path}/flow.json", f"b={tmp_path}/flow.json", f"a={tmp_path}/flow.json"]
    assert tiny.dmf("report", f"--output={tmp_path}/report", *arguments) == 2
    assert "flow.json: a is given twice; give each" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_averages_are_rows_of_their_own():
    rows = [{"ema": ema, "steps": 1, "count": 50, "fid": d} for ema, d in (("a", 3.0), ("", 4.0))]
    both = {**FLOW, "results": rows, "protocol": {"name": "adm", "metrics": ["fid"]}}
    lines = evaluation_report.markdown_table({"map": both}, "fid").splitlines()
    assert lines[0].startswith("| FID | 1 step")
    assert lines[2:4] == ["| map (a) | 3.00 |", "| map (parameters) | 4.00 |"]
    assert "0.28" not in lines[-1]


@pytest.mark.parametrize(
    ("field", "message"),
    [("protocol", "its protocol is other, and that of flow is pixels"),
     ("reference", "its reference is other, and that of flow is digits")],
)
def test_numbers_that_cannot_be_compared_are_refused(field, message):
    other = {**MAP, field: {**MAP[field], "name": "other"}}
    with pytest.raises(InputError, match=message):
        evaluation_report.check_comparable({"flow": FLOW, "map": other}, "fd_pixels")
    with pytest.raises(InputError, match="metric=fid: flow has fd_pixels"):
        evaluation_report.check_comparable({"flow": FLOW}, "fid")


def network(parameters, checkpoint="a.npz"):
    return {"inception": {"checkpoint": checkpoint, "parameters": parameters, "input": "bilinear"}}


@pytest.mark.parametrize(
    ("ours", "its", "message"),
    [
        ({"reference": {"name": "digits", "fingerprint": "f"}},
         {"reference": {"name": "digits", "fingerprint": "g"}}, r"reference.fingerprint is g, and"),
        ({"networks": network("f")}, {"networks": network("g")},
         r"networks.inception.parameters is g, and that of flow is f; only evaluations with the"),
        ({"protocol": FLOW["protocol"] | {"rounding": "down"}},
         {"protocol": FLOW["protocol"] | {"rounding": "nearest"}}, "protocol.rounding is nearest"),
        ({}, {"results": [{**FLOW["results"][0], "count": 500}]},
         "number of samples is 500, and that of flow is 5,000"),
    ],
    ids=["fingerprint", "networks", "rounding", "count"],
)
def test_equal_names_do_not_hide_other_measures(ours, its, message):
    ours, its = {**FLOW, **ours}, {**FLOW, **its}
    with pytest.raises(InputError, match=f"map: its {message}"):
        evaluation_report.check_comparable({"flow": ours, "map": its}, "fd_pixels")
    evaluation_report.check_comparable({"flow": ours, "again": ours}, "fd_pixels")


def test_neither_another_path_nor_what_older_files_lack_keeps_apart():
    here, there = ({**FLOW, "networks": network("f", path)} for path in ("a.npz", "b.npz"))
    evaluation_report.check_comparable({"older": FLOW, "a": here, "b": there}, "fd_pixels")
    other = {**FLOW, "networks": network("g")}
    with pytest.raises(InputError, match="and that of a is f"):
        evaluation_report.check_comparable({"older": FLOW, "a": here, "b": other}, "fd_pixels")


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path, capsys):
    for name, one in (("flow", FLOW), ("map", MAP)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    arguments = [f"{name}={tmp_path}/{name}.json" for name in ("flow", "map")]
    assert tiny.dmf("report", f"--output={tmp_path}/report", *arguments) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "report/report.md").read_text()
    assert "| map | 0.48 (93%)" in printed
    picture = PIL.Image.open(tmp_path / "report/distance.png")
    assert picture.size == (900, 600)
    assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


@pytest.mark.parametrize("before", [True, False], ids=["flags first", "flags last"])
def test_flags_are_taken_as_two_words_too(tmp_path, capsys, before):
    (tmp_path / "flow.json").write_text(json.dumps(FLOW))
    named = f"flow={tmp_path}/flow.json"
    flags = ["--output", f"{tmp_path}/out", "--metric", "fd_pixels"]
    arguments = [*flags, named] if before else [named, *flags]
    assert tiny.dmf("report", *arguments) == 0, capsys.readouterr().err
    assert "| flow | 5.85 | 0.70 |" in capsys.readouterr().out


def test_help_is_printed_and_a_flag_that_is_none_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        tiny.dmf("report", "flow=nowhere.json", "--help")
    assert not end.value.code and "--output" in capsys.readouterr().out
    assert tiny.dmf("report", "--outptu=x", "flow=nowhere.json") == 2
    assert "outptu" in capsys.readouterr().err


OTHERS = {
    "empty": {},
    "list": [1, 2],
    "results": {"results": 3},
    "no rows": {**FLOW, "results": []},
    "rows": {**FLOW, "results": [3]},
    "steps": {**FLOW, "results": [{"ema": "main", "steps": [1], "count": 9, "fd_pixels": 1.0}]},
    "count": {**FLOW, "results": [{"ema": "main", "steps": 1, "fd_pixels": 1.0}]},
    "average": {**FLOW, "results": [{"ema": [], "steps": 1, "count": 9, "fd_pixels": 1.0}]},
    "protocol": {**FLOW, "protocol": "pixels"},
    "metrics": {**FLOW, "protocol": {"name": "pixels", "metrics": 3}},
    "no metrics": {**FLOW, "protocol": {"name": "pixels", "metrics": []}},
    "reference": {**FLOW, "reference": None},
}


@pytest.mark.parametrize("case", ["text", "picture", *OTHERS])
def test_another_file_is_refused(tmp_path, case):
    path = tmp_path / "other.json"
    if case == "picture":
        PIL.Image.new("RGB", (3, 3)).save(path, format="png")
    else:
        path.write_text(json.dumps(OTHERS[case]) if case in OTHERS else "not json")
    with pytest.raises(InputError, match="other.json: not a file that dmf evaluate wrote"):
        evaluation_report.read_evaluation(path)


def test_what_measures_images_is_refused(tmp_path):
    images = {**FLOW, "results": [{"count": 5000, "fd_pixels": 2.0}]}
    (tmp_path / "images.json").write_text(json.dumps(images))
    with pytest.raises(InputError, match="images.json: it measures a set of images"):
        evaluation_report.read_evaluation(tmp_path / "images.json")


@pytest.mark.parametrize("arguments", [[], ["flow"], ["flow=nowhere.json"]])
def test_a_report_of_nothing_is_refused(tmp_path, capsys, arguments):
    assert tiny.dmf("report", f"--output={tmp_path}/report", *arguments) == 2
    assert "give NAME=FILE" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
