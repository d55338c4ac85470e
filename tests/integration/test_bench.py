"""tools/bench: each command once, as a person calls it; what it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def call(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [str(BENCH / command), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


def test_run_compare_plot(tmp_path: Path) -> None:
    results, svg = tmp_path / "results.json", tmp_path / "plot.svg"
    operations = "sign EC P-256,first key use"
    cells = ("--operations", operations, "--threads", "2", "--kinds", "plain,separately,process", "--not-cached")
    done = call(
        "run", *cells, "--seconds", "0.1", "--rounds", "1", "--warm-up", "0.1", "--network", "2:8", "--json", results
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(results.read_text())["results"]
    assert len(rows) == 3 * (2 + 1)
    assert all(row["calls"] and not row["errors"] for row in rows), rows
    assert "cores" in done.stdout, "the machine"

    compared = call("compare", results, results)
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.count("+0%") == 3
    slower = tmp_path / "slower.json"
    for row in rows:
        row["rate"] *= 0.5 if row["kind"] == "process" else 1
    slower.write_text(json.dumps({"machine": "this", "results": rows}))
    assert call("compare", results, slower).returncode == 1

    drawn = call("plot", results, svg)
    assert drawn.returncode == 0, drawn.stderr
    kinds = [item.text for item in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"sign EC P-256", "plain", "process, 2 members, not cached"} <= set(kinds)


def test_a_killed_member_costs_no_error(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    cells = ("--operations", "sign EC P-256", "--threads", "2", "--kinds", "process", "--disturb", "killed")
    done = call("run", *cells, "--seconds", "0.6", "--warm-up", "0", "--rounds", "1", "--json", results)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(results.read_text())["results"]
    assert row["calls"] and not row["errors"] and row["disturbed"] == "killed"


def test_what_cannot_be_is_refused_with_a_sentence(tmp_path: Path) -> None:
    for command, arguments, sentence in (
        ("run", ["--operations", "fly"], "no such operation: fly"),
        ("run", ["--disturb", "slow"], "needs the model of a network HSM"),
        ("run", ["--network", "fast"], "argument --network"),
        ("run", ["--disturb", "hung"], "--kinds process"),
        ("compare", [tmp_path / "none", tmp_path / "none"], "cannot be read"),
        ("plot", [BENCH / "README.md", tmp_path / "x.svg"], "is not a file of results"),
    ):
        done = call(command, *arguments)
        assert done.returncode != 0
        assert sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_full_journal_decides_as_quickly(tmp_path: Path) -> None:
    """Status, admission, search, changes and a member's resync take the same steps among 100 objects and 10,000."""
    results = tmp_path / "journal.json"
    done = call("journal", "--objects", "100,10000", "--json", results)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(results.read_text()).values()
    assert len(few) == 5
    for name, found in many.items():
        assert 0 < found["steps"] <= 2 * few[name]["steps"], (name, found, few[name])
