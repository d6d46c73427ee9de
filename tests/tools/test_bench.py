import sys

import pytest

from tools import bench
from utils import CommandError


@pytest.mark.parametrize(
    ("module", "arguments", "part"),
    [
        (None, ["--data=missing"], "Linux and macOS"),
        (bench.resource, ["--data=missing"], "missing: no such folder"),
        (bench.resource, ["--data=.", "--test-data=missing"], "missing: no such folder"),
    ],
)
def test_windows_and_missing_folders_are_errors(monkeypatch, module, arguments, part):
    monkeypatch.setattr(bench, "resource", module)
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(CommandError, match=part):
        bench.main()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["machine", "", "network", "", "sets", "", "command", "", "start", "", "peers of Set5 None"]),
        (["--only=sets"], ["machine", "", "sets"]),
        (["--only", "peers", "network"], ["machine", "", "network", "", "peers of Set5 None"]),
        (["--only=peers", "--test-data=test"], ["machine", "", "peers of test test"]),
        (["--only=peers", "--data=sets/91"], ["machine", "", "peers of Set5 Set5"]),
    ],
)
def test_chosen_tables_are_printed(tmp_path, monkeypatch, capsys, arguments, expected):
    for folder in ("data/91-image", "test", "sets/91", "sets/Set5"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(bench, "measure_ceilings", lambda: {"fp32": 1, "bf16": 2})
    monkeypatch.setattr(bench, "describe_machine", lambda ceilings: "machine")
    for name in ("network", "sets", "command", "start"):
        monkeypatch.setattr(bench, f"measure_{name}", lambda *_, name=name: name)
    monkeypatch.setattr(bench, "measure_peers", lambda folder, precisions: folder.name if folder else "None")
    monkeypatch.setattr(bench, "peer_table", lambda test_set, found: [f"peers of {test_set} {found}"])
    for name in ("network_table", "command_table", "start_table"):
        monkeypatch.setattr(bench, name, lambda found: [found])
    monkeypatch.setattr(bench, "set_table", lambda name, found: [found])
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    bench.main()
    assert capsys.readouterr().out.splitlines() == expected


def test_unknown_table_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=speed"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "invalid choice: 'speed'" in capsys.readouterr().err
