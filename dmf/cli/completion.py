"""dmf completion bash|zsh

Prints a script with which a shell completes the verbs of dmf, their flags, and the fields of a
config behind --config. For bash:

    dmf completion bash > ~/.local/share/bash-completion/completions/dmf

For zsh, where ~/.zfunc is in fpath before compinit is called:

    dmf completion zsh > ~/.zfunc/_dmf

A new version of dmf may have other flags: print the script again then.
"""

import contextlib
import importlib
import io
import re
from collections.abc import Mapping, Sequence

from absl import flags as absl_flags

from dmf.cli import VERBS, flags
from dmf.errors import InputError

_FLAG = re.compile(r"^  --(\[no\])?([a-z][a-z-]*) ", re.M)
_OVERRIDES = "--config."

_BASH = """\
_dmf() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} candidates
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=()
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$candidates" -- "$word")) ;;
  esac
  case "${{COMPREPLY[0]}}" in
    *=) compopt -o nospace ;;
  esac
}}
complete -o default -F _dmf dmf
"""

_ZSH = """\
#compdef dmf
_dmf() {{
  local candidates
  if (( CURRENT == 2 )); then
    compadd -- {verbs}
    return
  fi
  case "$words[2]" in
{cases}
  esac
  if [[ "$PREFIX" == --*=* ]]; then
    compset -P '*='
    _files
  elif [[ "$PREFIX" == -* ]]; then
    compadd -S '' -- ${{=candidates}}
  else
    _files
  fi
}}
if [ "$funcstack[1]" = _dmf ]; then
  _dmf "$@"
else
  compdef _dmf dmf
fi
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}


def main(verb: str, arguments: Sequence[str]) -> None:
    """Prints the completion script of a shell."""
    shells = flags.parse(verb, arguments, absl_flags.FlagValues(), __doc__)
    if len(shells) != 1 or shells[0] not in _SCRIPTS:
        raise InputError("shell", " ".join(shells), f"give one of {', '.join(_SCRIPTS)}")
    print(script(shells[0], {name: candidates(name) for name in VERBS}), end="")


def script(shell: str, flags_of_verbs: Mapping[str, Sequence[str]]) -> str:
    """The completion script of a shell.

    Args:
      shell: bash or zsh.
      flags_of_verbs: by the name of the verb.
    """
    cases = "\n".join(f'    {verb}) candidates="{" ".join(found)}" ;;'
                      for verb, found in flags_of_verbs.items())
    return _SCRIPTS[shell].format(verbs=" ".join([*flags_of_verbs, "--help", "--version"]),
                                  cases=cases)


def candidates(verb: str) -> list[str]:
    """The flags of a verb as its --help lists them, those with a value with a "=" behind; and the
    fields of a config for a verb that takes overrides of it."""
    module = importlib.import_module(f"dmf.cli.{verb}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main(verb, ["--help"])
    found = [f"--{name}" + ("" if is_boolean else "=")
             for is_boolean, name in _FLAG.findall(printed.getvalue())]
    return [*found, "--help", *(_overrides() if hasattr(module, "config_flag") else [])]


def _overrides() -> list[str]:
    """Overrides of the fields of the default config; other components have other fields."""
    from flax.traverse_util import flatten_dict

    from dmf.default_config import get_config

    fields = flatten_dict(get_config().to_dict(), sep=".")
    return [f"{_OVERRIDES}{field}=" for field in fields]
