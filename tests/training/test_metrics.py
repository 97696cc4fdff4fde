"""The metrics file of a continued run holds each number once."""

import json

from jaxlora.training.metrics import JsonLines, read_lines


def test_lines_after_the_checkpoint_and_a_line_cut_off_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 4, "lo')
    sink = JsonLines(path, after=2)
    assert read_lines(path) == records[:2]
    sink.write(3, {"loss": 0.5})
    sink.close()
    assert read_lines(path) == [*records[:2], {"step": 3, "loss": 0.5}]
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_known_of_a_step_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "eval_loss": 1.0}\n')
    sink = JsonLines(path, after=2)
    sink.write(2, {"eval_loss": 1.0})
    sink.write(2, {"eval_loss": 1.0, "exact_match": 0.5})
    sink.close()
    assert read_lines(path) == [{"step": 2, "eval_loss": 1.0}, {"step": 2, "exact_match": 0.5}]
