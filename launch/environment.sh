# shellcheck shell=bash
# To be sourced: a virtual environment of the project's own, with what is named installed.
#   PYTHON=python3.12 chooses the interpreter of a new one, DMF_VENV another directory. The versions
#   are those of constraints.txt; DMF_CONSTRAINTS= takes the newest, DMF_CONSTRAINTS=FILE others.
set -euo pipefail
python=${PYTHON:-python3}
venv=${DMF_VENV:-.venv}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "PYTHON=$python: it must be Python 3.11 or later" >&2
  exit 2
}
# venv writes the interpreter first and the script to activate it last.
[ -f "$venv/bin/activate" ] || "$python" -m venv "$venv"
version='import sys; print("%d.%d" % sys.version_info[:2])'
asked=$("$python" -c "$version") has=$("$venv/bin/python" -c "$version")
[ -z "${PYTHON:-}" ] || [ "$asked" = "$has" ] || {
  echo "PYTHON=$python: it is Python $asked, and $venv has $has; name another folder, DMF_VENV=..." >&2
  exit 2
}
# shellcheck source=/dev/null
. "$venv/bin/activate"
constraints=${DMF_CONSTRAINTS-constraints.txt}
python -m pip install --quiet --disable-pip-version-check \
  ${constraints:+--constraint "$constraints"} --editable "$1"
