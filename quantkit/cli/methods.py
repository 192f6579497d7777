"""`quantkit methods`: every step, its parameters, its paper."""

import json

import click

from quantkit.cli.options import CONTEXT, json_option
from quantkit.methods import METHODS, method_class
from quantkit.recipe import load_recipe, recipe_names


@click.command("methods", context_settings=CONTEXT)
@json_option
def command(as_json: bool) -> None:
    """List every step with its parameters (the first value is the default) and paper, and the bundled recipes."""
    if as_json:
        click.echo(json.dumps({"steps": [_described(name) for name in METHODS], "recipes": _recipes()}, indent=2))
        return
    for name in METHODS:
        method = method_class(name)
        click.echo(f"{name}: {method.summary}")
        for parameter in method.parameters:
            click.echo(f"    {parameter.name}={parameter.values}: {parameter.help}")
        if method.cost:
            click.echo(f"    cost: {method.cost}")
        click.echo(f"    paper: {method.paper}\n")
    click.echo("recipes (--recipe NAME):")
    for name, steps in _recipes().items():
        click.echo(f"    {name}: {' '.join(steps)}")


def _described(name: str) -> dict[str, object]:
    method = method_class(name)
    parameters = [
        {"name": p.name, "values": list(p.choices), "other": p.other or None, "help": p.help} for p in method.parameters
    ]
    words: dict[str, object] = {
        "name": name,
        "summary": method.summary,
        "parameters": parameters,
        "paper": method.paper,
    }
    return words | ({"cost": method.cost} if method.cost else {})


def _recipes() -> dict[str, list[str]]:
    return {name: [str(step) for step in load_recipe(name).steps] for name in recipe_names()}
