#!/usr/bin/env bash
# Lint and tests in a virtual environment of their own. Further arguments go to pytest; --slow adds
# the tests that need minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh ".[test]"
ruff check .
exec python -m pytest --numprocesses=2 --dist=worksteal --quiet "$@"
