"""The list of mutants: each can be put into its file, and every room of the package has some."""

import ast
import json
import pathlib

import pytest
import tiny

from benchmarks import mutants
from benchmarks.mutant_lists import Mutant

MUTANTS = mutants.MUTANTS


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


def test_every_text_occurs_once_and_every_named_test_is_there():
    assert mutants.problems(MUTANTS, tiny.ROOT) == []
    assert all(mutant.tests for mutant in MUTANTS)


@pytest.mark.parametrize("name", sorted({mutant.file for mutant in MUTANTS}))
def test_a_mutated_file_is_other_code_that_parses(name):
    original = (tiny.ROOT / name).read_text()
    for mutant in MUTANTS:
        if mutant.file == name:
            mutated = ast.parse(original.replace(mutant.old, mutant.new))
            assert ast.dump(mutated) != ast.dump(ast.parse(original)), mutant.name


def test_every_room_has_mutants():
    package = tiny.ROOT / "dmf"
    rooms = {path.parent.relative_to(package).parts[0] for path in package.glob("*/*.py")}
    assert rooms == {pathlib.Path(mutant.file).parts[1] for mutant in MUTANTS
                     if len(pathlib.Path(mutant.file).parts) > 2}


GOOD = Mutant("good", "a fault", "room.py", "x = 1", "x = 2", ("test_room.py",))


@pytest.mark.parametrize("fields, words", [
    ({"old": "y = 1"}, "occurs 0 times in room.py"),
    ({"old": "1"}, "occurs 2 times in room.py"),
    ({"new": "x = 1"}, "occurs 1 times in room.py, and must occur once and be replaced"),
    ({"file": "none.py"}, "occurs 0 times in none.py"),
    ({"tests": ("test_none.py",)}, "there is no test_none.py"),
])
def test_a_mutant_that_cannot_be_is_named(fields, words, tmp_path):
    (tmp_path / "room.py").write_text("x = 1\nz = 1\n")
    (tmp_path / "test_room.py").touch()
    assert mutants.problems([GOOD], tmp_path) == []
    (line,) = mutants.problems([GOOD._replace(**fields)], tmp_path)
    assert line.startswith("mutant good: ")
    assert words in line


@pytest.mark.parametrize("code, output, expected", [
    (0, "2 passed in 1.0s", []),
    (1, "FAILED t.py::test_x[a b] - assert 1 == 2\n1 failed in 1.0s", ["t.py::test_x[a b]"]),
    (1, "ERROR t.py::test_x\n1 error in 1.0s", ["t.py::test_x"]),
    (2, "FAILED t.py::test_x\n!!! Interrupted: stopping after 1 failures !!!", ["t.py::test_x"]),
    (2, "ERROR t.py\n!!! Interrupted: 1 error during collection !!!", None),
    (1, "nothing", None),
    (4, "ERROR: file or directory not found: t.py", None),
])
def test_what_pytest_says_is_understood(monkeypatch, code, output, expected):
    copy = object.__new__(mutants.Copy)
    monkeypatch.setattr(mutants.Copy, "run", lambda self, *arguments: (code, output))
    if expected is not None:
        assert copy.failures("t.py") == expected
    else:
        with pytest.raises(RuntimeError, match=f"pytest t.py ended with {code}"):
            copy.failures("t.py")


class FakeCopy:
    """Stands for a copy whose tests fail as given, and counts the runs of tests."""

    def __init__(self, folder, *failures):
        self.folder, self.left, self.seen = folder, list(failures), []

    def digest(self, mutant):
        return "a digest"

    def failures(self, *arguments):
        self.seen.append((arguments, (self.folder / "room.py").read_text()))
        return self.left.pop(0)


@pytest.fixture
def room(tmp_path, monkeypatch):
    (tmp_path / "room.py").write_text("x = 1\n")
    monkeypatch.setattr(mutants, "_FIRST_ONLY", type("Flag", (), {"value": False}))
    return tmp_path


def test_the_rest_of_the_tests_runs_only_where_the_named_ones_pass(room):
    copy = FakeCopy(room, ["test_room.py::test_x"])
    assert mutants.try_mutant(copy, GOOD)[:4] == ("good", "a digest", "test_room.py::test_x", True)
    assert [text for _, text in copy.seen] == ["x = 2\n"]
    copy = FakeCopy(room, [], ["test_other.py::test_y"])
    assert mutants.try_mutant(copy, GOOD)[2:4] == ("test_other.py::test_y", False)
    assert "--ignore=test_room.py" in copy.seen[1][0]
    copy = FakeCopy(room, [], [])
    assert str(mutants.try_mutant(copy, GOOD)) == "NOT FOUND"
    assert (room / "room.py").read_text() == "x = 1\n"


def test_a_known_result_is_not_repeated_and_one_of_other_files_is(room, capsys):
    log = room / "log.jsonl"
    (first,) = mutants.results(FakeCopy(room, ["test_room.py::test_x"]), [GOOD], log)
    assert [mutants.Result(*json.loads(line)) for line in log.read_text().splitlines()] == [first]
    assert [*mutants.results(FakeCopy(room), [GOOD], log)] == [first]
    log.write_text(json.dumps(first._replace(digest="another")) + "\n")
    copy = FakeCopy(room, [], [])
    (again,) = mutants.results(copy, [GOOD], log)
    assert not again.test
    assert len(copy.seen) == 2
    assert "good: NOT FOUND" in capsys.readouterr().out


def test_a_test_that_fails_without_a_mutant_has_found_nothing(room):
    found = [mutants.Result(name, "", f"test_{name}.py::test_x", True, 1.0) for name in "ab"]
    kept = mutants.without_failures(FakeCopy(room, ["test_b.py::test_x"]), found)
    assert [result.test for result in kept] == ["test_a.py::test_x", ""]
