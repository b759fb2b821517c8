import io
import json
import sys

import pytest
from rich.console import Console

from clipdistill_jax.train import writers


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_has_each_step_once_after_a_resume(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer.start(0, 10)
    for step in (2, 4, 6):
        writer.write(step, {"train/loss": 1.0 / step, "val/bad": float("nan")})
    with path.open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while writing
    again = writers.JsonlWriter(path)
    again.start(4, 10)
    again.write(6, {"train/loss": 7.0})
    assert [line["step"] for line in read(path)] == [2, 4, 6]
    assert read(path)[1] == {"step": 4, "train/loss": 0.25, "val/bad": None}
    assert read(path)[2]["train/loss"] == 7.0
    writers.JsonlWriter(path).start(0, 10)
    assert read(path) == []


VALUES = {
    "train/loss": 1.23456,
    "train/accuracy": 0.5,
    "train/learning_rate": 1e-4,
    "speed/steps_per_sec": 2.0,
    "speed/frames_per_sec": 64.0,
    "speed/data_wait": 0.031,
}


def console(terminal, keys=()):
    out = io.StringIO()
    made = Console(file=out, force_terminal=terminal, width=150, color_system=None)
    return writers.ConsoleWriter("frames", keys, made), out


def test_console_without_a_terminal_writes_plain_lines():
    writer, out = console(False, ("accuracy",))
    writer.start(0, 1000)
    for step in range(1, 101):
        writer.advance(step)
    writer.write(100, VALUES)
    writer.write(200, {"val/r1": 0.25, "val/r5": 0.5})
    writer.close()
    assert out.getvalue().splitlines() == [
        "step 100/1000 (10%)  loss 1.235  accuracy 0.5  lr 1.00e-04  64.0 frames/s  "
        "data wait 3.1%  eta 0:07:30",
        "step 200  val/r1 0.25  val/r5 0.5",
    ]


def test_console_on_a_terminal_shows_a_bar():
    writer, out = console(True)
    writer.start(400, 1000)
    writer.advance(500)
    writer.write(500, VALUES)
    writer.close()
    text = out.getvalue()
    assert "━" in text and "500/1000" in text and "64.0 frames/s" in text and "eta 0:04:10" in text
    writer.close()


def test_multi_passes_everything_on_and_only_the_first_host_writes(monkeypatch):
    class Log(writers.NullWriter):
        def __init__(self):
            self.calls = []

        def start(self, *args):
            self.calls.append(("start", *args))

        def advance(self, *args):
            self.calls.append(("advance", *args))

        def write(self, *args):
            self.calls.append(("write", *args))

        def close(self):
            self.calls.append(("close",))

    logs = [Log(), Log()]
    writer = writers.MultiWriter(logs)
    writer.start(0, 2)
    writer.advance(1)
    writer.write(1, {"a": 1.0})
    writer.close()
    expected = [("start", 0, 2), ("advance", 1), ("write", 1, {"a": 1.0}), ("close",)]
    assert logs[0].calls == logs[1].calls == expected

    assert isinstance(writers.on_first_host(Log), Log)
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    assert type(writers.on_first_host(Log)) is writers.NullWriter


def test_tensorboard_events_can_be_read(tmp_path):
    pytest.importorskip("tensorboardX", reason="the TensorBoard writer needs tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c  # noqa: F401  (the framing below is its)

    writer = writers.TensorBoardWriter(tmp_path)
    writer.start(0, 4)
    writer.write(2, {"train/loss": 0.5})
    writer.close()
    (file,) = tmp_path.iterdir()
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert found == [(2, "train/loss", 0.5)]


def test_a_missing_tensorboardx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboardX"):
        writers.TensorBoardWriter(tmp_path).start(0, 1)
