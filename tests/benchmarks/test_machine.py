"""What a result says of how it was made is what anybody can repeat."""

import argparse
import json
from pathlib import Path

import machine
import pytest


def test_the_command_names_no_folder_of_the_machine(monkeypatch):
    argv = ["/home/me/benchmarks/speed.py", "--data", "/home/me/data", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", argv)
    command = machine.command(Path("/home/me/data"))
    assert command == "python benchmarks/speed.py --data PATH --rounds 2"


@pytest.mark.parametrize("timed", [True, False])
def test_a_busy_machine_is_refused_where_something_is_timed(timed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks/speed.py", "--data", str(tmp_path)])
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(machine, "load_now", lambda: {"load_average": [99.0]})
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)

    def program():
        machine.run("speed", parser, lambda options: {"found": 7}, lambda r: "7!", timed=timed)

    if timed:
        with pytest.raises(SystemExit, match="load average 99"):
            program()
        assert not list(tmp_path.iterdir())
        return
    program()
    (written,) = tmp_path.glob("*-speed.json")
    result = json.loads(written.read_text())
    assert (result["found"], capsys.readouterr().out) == (7, "7!\n")
    assert result["command"] == "python benchmarks/speed.py --data PATH"
