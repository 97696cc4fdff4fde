from jaxlora.training.progress import Display

VALUES = {"epoch": 0.1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3}


def test_the_first_step_has_a_line_and_then_every_logging_step(capsys):
    display = Display(4, first=1)
    for log in (False, False, True):
        display.advance(5)
        display.update(VALUES, log=log)
    first, logged = capsys.readouterr().out.splitlines()
    assert first.startswith("step 2/4")
    assert "loss 2.0000" in first
    assert "- tok/s" in first  # it compiled
    assert logged.startswith("step 4/4")
