"""``ha-watchdog``: the service's command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hagroup.config import logging as logs
from hagroup.errors import HAError
from hagroup.watchdog import install as installing
from hagroup.watchdog.service import Service

USAGE = 2
_UsageError: Any = typer.BadParameter.__mro__[1]
"""By way of typer: its newer versions bring a click of their own, and need no other."""

app = typer.Typer(
    name="ha-watchdog",
    help="Watches groups of HSMs: notices failures, tells people, brings members back. Runs in the foreground.\n\n"
    "SIGTERM: ends within 5 seconds. SIGHUP: reads the configuration again.\n\n"
    "Exit status of --once: 0 fine; 1 degraded or out of sync; 2 usage or configuration; 3 nothing reachable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def watch(
    context: typer.Context,
    config: Annotated[
        list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="hagroup.toml; once for each group")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="look, tell what is new, and end")] = False,
) -> None:
    """Watch the groups of these configurations."""
    if context.invoked_subcommand is not None:
        return
    if not config:
        raise _UsageError("give --config FILE, once for each group")
    logs.configure("console")
    service = Service(config)
    raise typer.Exit(service.once() if once else service.run())


@app.command()
def install(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be written")] = False,
    into: Annotated[
        Path, typer.Option("--into", metavar="DIR", help="where systemd looks for units")
    ] = installing.SYSTEMD,
) -> None:
    """Write the systemd units."""
    for path, text in installing.units(into):
        if dry_run:
            print(f"# {path}\n{text}")
        else:
            installing.write(path, text)
            print(path)
    if not dry_run:
        print(
            "now: systemctl daemon-reload && systemctl enable --now ha-watchdog@GROUP (/etc/hagroup/GROUP/hagroup.toml)"
        )


def main() -> None:
    """Entry point: an error is one sentence on standard error, never a traceback."""
    try:
        status = app(standalone_mode=False)
    except HAError as error:
        print(f"ha-watchdog: {error}", file=sys.stderr)
        status = USAGE
    except _UsageError as error:
        print(f"ha-watchdog: {error.format_message()}", file=sys.stderr)
        status = USAGE
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except OSError as error:
        print(f"ha-watchdog: {f'{error.filename}: {error.strerror}' if error.filename else error}", file=sys.stderr)
        status = USAGE
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
