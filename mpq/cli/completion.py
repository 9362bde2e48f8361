"""`mpq completion`: a script that completes commands and options in bash and zsh."""

import argparse
from collections.abc import Mapping

from mpq.cli.options import AddCommand

SCRIPT = """_mpq() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
        *) [ "$COMP_CWORD" -eq 1 ] && COMPREPLY=($(compgen -W "$words" -- "$word")) || COMPREPLY=() ;;
    esac
}}
complete -o default -F _mpq mpq
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def add(command: AddCommand) -> None:
    """Add the command to the grammar."""
    completion = command("completion", run, "print a script for shell completion")
    completion.add_argument("shell", choices=("bash", "zsh"), help='as in: eval "$(mpq completion bash)"')


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from mpq.cli.main import grammar

    print((ZSH if options.shell == "zsh" else "") + script(grammar()[1]), end="")


def script(commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """The completion function: commands first, then the options of the command."""
    cases = [f'            {name}) words="{" ".join(_options(parser))}" ;;' for name, parser in commands.items()]
    return SCRIPT.format(commands=" ".join(commands), cases="\n".join(cases))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--")]
