"""Recipes: the options of one run in a YAML file, written beside its result so that it can be repeated."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mpq.core.errors import MpqError, first_line, nearest_names
from mpq.core.files import write_atomically

FILE = "recipe.yaml"
NOT_RECORDED = ("help", "output", "force", "json", "quiet", "verbose", "recipe")
BUDGETS = (
    "bits",
    "size",
    "max-kl",
    "memory",
    "kv-bits",
)  # mutually exclusive: one on the command line replaces the recipe's


def expand(arguments: Sequence[str], commands: Mapping[str, argparse.ArgumentParser]) -> list[str]:
    """The arguments with those of the named recipe inserted before the user's own, which take precedence.

    Raises:
        MpqError: a recipe that cannot be read, or an option that the command does not have.
    """
    expanded = list(arguments)
    place = next((i for i, argument in enumerate(expanded) if argument.split("=")[0] == "--recipe"), None)
    start = next((i for i, argument in enumerate(expanded) if argument in commands), None)
    if place is None or start is None:
        return expanded
    path = expanded[place].partition("=")[2] or "".join(expanded[place + 1 : place + 2])
    recipe = read(path)
    if any(argument.split("=")[0] in [f"--{name}" for name in BUDGETS] for argument in expanded):
        recipe = {name: value for name, value in recipe.items() if name not in BUDGETS}
    options = _options(commands[expanded[start]])
    flags = []
    for name, value in recipe.items():
        if name not in options:
            raise MpqError(f"{path}: unknown option {name!r}: {nearest_names(name, options)}")
        if not options[name].option_strings:
            continue  # a positional argument: `fill` sets it
        for item in value if isinstance(value, list) else [value]:
            if item is not None and item is not False:
                flags += [f"--{name}"] if item is True else [f"--{name}={item}"]
    return [*expanded[: start + 1], *flags, *expanded[start + 1 :]]


def fill(options: argparse.Namespace) -> None:
    """Take the model from the recipe where the command line names none."""
    if options.model is None and options.recipe:
        options.model = read(options.recipe).get("model")
    if options.model is None:
        raise MpqError("no model: name one, e.g. tiny-lm, or give a --recipe that does")


def read(path: str | Path) -> dict[str, Any]:
    """The options in a recipe; MpqError when it cannot be read."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MpqError(f"cannot read the recipe {path}: {first_line(error)}") from error
    if not isinstance(recipe, dict):
        raise MpqError(f"cannot read the recipe {path}: expected lines such as 'bits: 4.25'")
    return {str(name): value for name, value in recipe.items()}


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that differ from their defaults, by name."""
    recipe = {}
    for name, action in _options(options.grammar).items():
        value = getattr(options, action.dest)
        if name not in NOT_RECORDED and value != action.default:
            recipe[name] = value
    return recipe


def check_output(folder: str, recipe: Mapping[str, Any], force: bool) -> None:
    """MpqError when the folder holds a result of other settings, unless it may be overwritten."""
    path = Path(folder)
    if force or not (path / "allocation.json").exists():
        return
    advice = "give --force to overwrite it, or name another folder"
    earlier = next((read(file) for file in (path / FILE, _draft(path)) if file.is_file()), None)
    if earlier is None:
        raise MpqError(f"{path} holds a result without a recipe: {advice}")
    changed = [name for name in {**earlier, **recipe} if earlier.get(name) != recipe.get(name)]
    if changed:
        differences = ", ".join(f"{name} was {earlier.get(name, 'the default')}" for name in changed)
        raise MpqError(f"{path} holds a result of other settings ({differences}): {advice}")


def begin(folder: str, recipe: Mapping[str, Any]) -> None:
    """Record what is about to be done, so that an interrupted run may be continued."""
    with write_atomically(_draft(Path(folder))) as draft:
        draft.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")


def finish(folder: str) -> None:
    """Record that it is done."""
    _draft(Path(folder)).replace(Path(folder) / FILE)


def _draft(folder: Path) -> Path:
    return folder / f"{FILE}.unfinished"


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options and positional arguments of a command, by their long name without dashes."""
    return {
        max(action.option_strings, key=len, default=action.dest).lstrip("-"): action
        for action in parser._actions
        if action.dest != "help"
    }
