"""Scripts with which a shell completes the arguments of `python train.py ...` and the other commands.

    eval "$(python train.py --completion=bash)"            in ~/.bashrc; the same for the other commands
    eval "$(python train.py --completion=zsh)"             in ~/.zshrc, after compinit
    python train.py --completion=fish | source             in ~/.config/fish/config.fish

The scripts of several commands live side by side: the word that ends in .py says whose arguments are completed.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PROGRAMS = ("python", "python3", "torchrun")  # that run a command


class Flag(NamedTuple):
    """What a shell has to know of an argument."""

    name: str
    help: str
    choices: tuple[str, ...] = ()
    is_switch: bool = False  # has a form without a value, and --no-NAME
    is_path: bool = False


def script(shell: str, program: str, flags: Iterable[Flag]) -> str:
    """The script for a shell, an entry of SHELLS. program: the command's file, such as train.py."""
    return SHELLS[shell](Path(program).name, list(flags))


def spellings(flag: Flag, equals: str = "=") -> list[str]:
    """What may be typed: a switch alone, others with a value."""
    return [f"--{flag.name}", f"--no-{flag.name}"] if flag.is_switch else [f"--{flag.name}{equals}"]


def identifier(program: str) -> str:
    """A program's name as part of a shell function's."""
    return re.sub(r"\W", "_", program)


def one_line(text: str) -> str:
    """A help text up to its first sentence's end, without characters that shells read."""
    return re.sub(r"[^\w ,.()<>=/+-]", "", text.partition("; ")[0])


def cases(flags: Iterable[Flag]) -> str:
    """Branches of a bash case statement: a flag's values."""
    lines = [
        f'    --{flag.name}) words="{" ".join(flag.choices)}" ;;' for flag in flags if flag.choices and not flag.is_path
    ]
    paths = [f"--{flag.name}" for flag in flags if flag.is_path]
    return "\n".join([*lines, *([f"    {'|'.join(paths)}) files=1 ;;"] if paths else [])])


def bash(program: str, flags: list[Flag]) -> str:
    """bash splits words at `=`, so the flag of a value stands one or two words before it."""
    words = " ".join(spelling for flag in flags for spelling in spellings(flag))
    return f"""_nanoforge_{identifier(program)}() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" flag="" words="" files=""
  if [[ $cur == "=" ]]; then flag=$prev cur=""
  elif [[ $prev == "=" ]]; then flag=${{COMP_WORDS[COMP_CWORD-2]}}
  elif [[ $prev == --* && $cur != -* ]]; then flag=$prev
  fi
  case "$flag" in
{cases(flags)}
  esac
  if [[ -z $flag && $cur == -* ]]; then
    COMPREPLY=($(compgen -W "{words}" -- "$cur"))
    [[ ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
  elif [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$cur"))
  elif [[ -n $files || -z $flag ]]; then compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
_nanoforge() {{
  local word name
  for word in "${{COMP_WORDS[@]:0:COMP_CWORD}}"; do
    name="${{word##*/}}"; name="_nanoforge_${{name//[^a-zA-Z0-9_]/_}}"
    if [[ $word == *.py ]] && declare -F "$name" >/dev/null; then "$name"; return; fi
  done
  compopt -o filenames; COMPREPLY=($(compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -F _nanoforge {" ".join(PROGRAMS)}
"""


def zsh(program: str, flags: list[Flag]) -> str:
    """Descriptions come from the help texts."""
    specs = []
    for flag in flags:
        values = "_files" if flag.is_path else f"({' '.join(flag.choices)})"
        for spelling in spellings(flag):
            argument = f":value:{values}" if spelling.endswith("=") else ""
            specs.append(f"    '{spelling}[{one_line(flag.help)}]{argument}'")
    lines = " \\\n".join(["  _arguments -s", *specs, "    '*:file:_files'"])
    return f"""_nanoforge_{identifier(program)}() {{
{lines}
}}
_nanoforge() {{
  local i name
  for ((i = 1; i < CURRENT; i++)); do
    name="_nanoforge_${{${{words[i]:t}}//[^a-zA-Z0-9_]/_}}"
    if [[ $words[i] == *.py ]] && (( $+functions[$name] )); then
      words=("${{(@)words[i,-1]}}"); (( CURRENT -= i - 1 )); $name; return
    fi
  done
  _files
}}
compdef _nanoforge {" ".join(PROGRAMS)}
"""


def fish(program: str, flags: list[Flag]) -> str:
    """A condition finds the command among the words typed so far."""
    name = f"__nanoforge_{identifier(program)}"
    lines = [f"function {name}; string match -qr '(^|/){re.escape(program)}$' -- (commandline -opc); end"]
    for flag in flags:
        help_text = one_line(flag.help)
        values = f"-x -a '{' '.join(flag.choices)}'" if flag.choices else "-x"
        if flag.is_path:
            values = "-r -F"
        for spelling in spellings(flag, equals=""):
            options = "" if flag.is_switch else f" {values}"
            lines.append(f"complete -c $program -n {name} -l {spelling[2:]}{options} -d '{help_text}'")
    body = "\n  ".join(lines[1:])
    return f"{lines[0]}\nfor program in {' '.join(PROGRAMS)}\n  {body}\nend\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}
