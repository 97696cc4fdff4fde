"""What a result says of how it was made is what anybody can repeat."""

from pathlib import Path

import machine


def test_the_command_names_no_folder_of_the_machine(monkeypatch):
    argv = ["/home/me/benchmarks/speed.py", "--data", "/home/me/data", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", argv)
    command = machine.command(Path("/home/me/data"))
    assert command == "python benchmarks/speed.py --data PATH --rounds 2"
