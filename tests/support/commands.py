"""ha-admin in this process: a command without the cost of starting a program for it."""

from __future__ import annotations

import functools
import os
import sys

import pytest
import typer.main

from hagroup.admin import cli, options

made_once = functools.cache(typer.main.get_command)
"""Typer makes all commands anew for each call, which takes longer than most of them."""


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error); nobody is there to be asked."""
    with monkeypatch.context() as here, open(os.devnull) as nothing:
        here.setattr(sys, "argv", ["ha-admin", *words])
        here.setattr(options, "_chosen", {})
        here.setattr(typer.main, "get_command", made_once)
        here.setattr(sys, "stdin", nothing)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err, words
    assert isinstance(ended.value.code, int), words
    return ended.value.code, shown.out, shown.err
