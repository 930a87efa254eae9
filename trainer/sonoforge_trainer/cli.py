"""The `sonoforge` command: a thin shell that loads each sub-command only when it is called.

Sub-commands are entry points of the group `sonoforge.commands`, so the operator's image, which has no torch, offers
what it can run and says which extra the rest needs.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points

import click

from sonoforge_trainer.contract import ContractError, ExitCode


class _Commands(click.Group):
    def __init__(self) -> None:
        super().__init__(name="sonoforge", help="Pretrain ultrasound foundation models, and evaluate every checkpoint.")
        self._entries: dict[str, EntryPoint] = {e.name: e for e in entry_points(group="sonoforge.commands")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._entries.get(cmd_name)
        if entry is None:
            return None
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("sonoforge"):
                raise
            extra = "operator" if entry.value.startswith("sonoforge_operator") else "trainer"
            return _unavailable(cmd_name, extra, error.name or "a module")
        assert isinstance(command, click.Command)
        return command


def _unavailable(name: str, extra: str, module: str) -> click.Command:
    """A stand-in that keeps `sonoforge --help` working where an extra is not installed."""

    @click.command(
        name,
        short_help=f"(needs the extra: sonoforge[{extra}])",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )
    def command() -> None:
        raise click.ClickException(f"`sonoforge {name}` needs {module}; install sonoforge[{extra}]")

    return command


def main() -> None:
    """Run the command line. User errors end with ExitCode.CONFIG and no traceback."""
    try:
        _Commands()(standalone_mode=True)
    except ContractError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(ExitCode.CONFIG)
