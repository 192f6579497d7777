"""The house rules, as tests: lint, format, types, import layers, generated docs, licence, package contents."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

COMMANDS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "layers": ["lint-imports"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_house_rule(name: str) -> None:
    program, *arguments = COMMANDS[name]
    ran = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_command_line_docs_are_those_of_the_program() -> None:
    from quantkit.cli.reference import markdown

    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == markdown(), "run: python -m quantkit.cli.reference > docs/cli.md"


def test_every_command_and_option_is_described() -> None:
    from quantkit.cli import main

    for name, command in main.commands.items():
        assert command.help, name
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{name} {parameter.name}"  # type: ignore[attr-defined]


def test_files_stay_readable() -> None:
    """No source file is over 500 lines: one room, one thing."""
    folders = ("quantkit", "kernels", "calibration", "eval", "tests", "examples")
    long = [
        f"{path.relative_to(ROOT)}: {count}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 500
    ]
    assert not long


def test_versions_in_constraints_lie_in_the_ranges_of_the_package() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {
        requirement.name.replace("_", "-").lower(): requirement
        for text in [
            *project["dependencies"],
            *(text for extra in project["optional-dependencies"].values() for text in extra),
        ]
        for requirement in [Requirement(text)]
    }
    for file in ("constraints.txt", "tests/constraints-oldest.txt"):
        lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
        for line in lines:
            pinned = Requirement(line)
            name = pinned.name.replace("_", "-").lower()
            version = next(iter(pinned.specifier)).version
            if name in ranges:
                assert ranges[name].specifier.contains(version), f"{file}: {line} against {ranges[name]}"
