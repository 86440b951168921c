"""Event files for TensorBoard, by its own writer (torch's would import torch), in `<folder>/tensorboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from captioning import storage
from captioning.run_logs.records import Record

FOLDER = "tensorboard"
FLUSH_S = 5


class TensorBoardSink:
    """Begins with an event that tells a TensorBoard that is looking to forget what it saw of this run before."""

    def __init__(self, folder: Path, about: Record) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._text_pb = event_pb2.Event, summary_pb2.Summary, text_pb
        storage.remove(folder / FOLDER)
        self._writer = EventFileWriter(str(folder / FOLDER), max_queue_size=1000, flush_secs=FLUSH_S)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(step=0, session_log=start))
        params = json.dumps(about["params"], indent=1)
        self._add(text_pb("params", "\n".join(f"    {line}" for line in params.splitlines())).value, 0)

    def _add(self, values: Any, step: int, time: float | None = None) -> None:
        self._writer.add_event(self._event(wall_time=time, step=step, summary=self._summary(value=values)))

    def write(self, index: int, record: Record) -> None:
        scalars = {**record["metrics"], **{f"machine/{name}": v for name, v in record.get("machine", {}).items()}}
        value = self._summary.Value
        values = [value(tag=tag, simple_value=number) for tag, number in scalars.items()]
        for name, counted in record.get("histograms", {}).items():
            values.append(value(tag=f"parameters/{name}", histo=_histogram(counted)))
        if "captions" in record:
            values.extend(self._text_pb("val/captions", as_markdown(record["captions"])).value)
        self._add(values, record["step"], record["time"])

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()


def _histogram(counted: Record) -> Any:
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    low, high, counts = counted["low"], counted["high"], counted["counts"]
    width = (high - low) / len(counts)
    # A bucket is named by its upper limit, so the first has no lower one: an empty one before it gives that.
    limits = [low, *(low + width * (i + 1) for i in range(len(counts)))]
    return HistogramProto(
        min=low, max=high, num=sum(counts), sum=counted["sum"], sum_squares=counted["sum_squares"],
        bucket_limit=limits, bucket=[0, *counts],
    )  # fmt: skip


def as_markdown(captions: list[Record]) -> str:
    """A table, a row an image."""

    def cell(text: str) -> str:
        return " ".join(text.replace("|", "\\|").split())

    rows = [f"| {cell(c['image_id'])} | {cell(c['caption'])} | {cell('; '.join(c['references']))} |" for c in captions]
    return "\n".join(["| image | caption | references |", "|---|---|---|", *rows])
