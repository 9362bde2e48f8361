import argparse

import pytest
import yaml

from mpq.cli import recipe
from mpq.cli.main import grammar
from mpq.core.errors import MpqError

ARGUMENTS = ["quantize", "tiny-cnn", "--bits", "4.25", "--exclude", "a*", "--exclude", "b", "--no-ties", "-o", "out"]


def parsed(arguments: list[str]) -> argparse.Namespace:
    top, commands = grammar()
    return top.parse_args(recipe.expand(arguments, commands))


def saved(tmp_path, steps) -> str:
    path = tmp_path / "steps.yaml"
    path.write_text(yaml.safe_dump(steps))
    return str(path)


def test_a_recipe_repeats_the_options_it_was_made_of(tmp_path):
    steps = recipe.recipe_of(parsed(ARGUMENTS))
    assert steps == {"model": "tiny-cnn", "bits": 4.25, "exclude": ["a*", "b"], "no-ties": True}
    again = parsed(["quantize", "--recipe", saved(tmp_path, steps), "-o", "other"])
    recipe.fill(again)
    assert recipe.recipe_of(again) == steps
    assert again.output == "other"


def test_the_command_line_wins_over_the_recipe(tmp_path):
    path = saved(tmp_path, {"model": "tiny-cnn", "bits": 4.25, "seed": 3, "method": "gptq"})
    options = parsed(["quantize", "tiny-lm", f"--recipe={path}", "--size", "1MB", "--seed", "5", "-o", "out"])
    recipe.fill(options)
    assert (options.model, options.bits, options.size, options.seed) == ("tiny-lm", None, 1e6, 5)
    assert options.method == "gptq"


@pytest.mark.parametrize(
    ("text", "message"),
    [("bitts: 4\n", "did you mean bits"), ("- a\n", "expected lines such as"), ("{", "cannot read the recipe")],
)
def test_invalid_recipes_are_refused(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(MpqError, match=message):
        parsed(["quantize", "--recipe", str(tmp_path / "bad.yaml"), "-o", "out"])


def test_no_model_at_all_is_reported():
    with pytest.raises(MpqError, match="no model"):
        recipe.fill(parsed(["quantize", "--bits", "4", "-o", "out"]))


def test_a_result_of_other_settings_is_not_overwritten(tmp_path):
    folder, steps = tmp_path / "out", {"model": "tiny-cnn", "bits": 4.25}
    recipe.check_output(str(folder), steps, force=False)
    recipe.begin(str(folder), steps)
    (folder / "allocation.json").write_text("{}")
    recipe.check_output(str(folder), steps, force=False)  # interrupted before it was finished
    recipe.finish(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["allocation.json", "recipe.yaml"]
    recipe.check_output(str(folder), steps, force=False)
    with pytest.raises(MpqError, match=r"other settings \(bits was 4.25, seed was the default\): give --force"):
        recipe.check_output(str(folder), {**steps, "bits": 3.0, "seed": 1}, force=False)
    recipe.check_output(str(folder), {"bits": 3.0}, force=True)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(MpqError, match="without a recipe"):
        recipe.check_output(str(folder), steps, force=False)
