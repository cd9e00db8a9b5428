"""``paci bench codecs``: what it takes to make a message small, and on which links that pays."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from paci.bench.question import Question, Row, numbers
from paci.bench.timed import mean_s, on_threads
from paci.schedule.base import require_count

if TYPE_CHECKING:
    from paci.bench.turns import Say


@dataclass(frozen=True)
class CodecTimes(Question):
    """Codecs of activations, each on the same messages of normally distributed bfloat16, in turns.

    A codec pays on links of a rate at which the bytes that it saves take longer than encoding and
    decoding do.

    Args:
        codecs: as of ``paci train``, separated by spaces.
        widths: values of a row, separated by commas.
        rows: of a message.
        threads: CPU threads.
        device: ``auto``, ``cpu`` or ``cuda``.
        turns: times that each is measured, A B A B.
        messages: those timed in a turn.
    """

    codecs: str = "int8 int4 lowrank:rank=64 topk:share=0.1"
    widths: str = "256,1024"
    rows: int = 2048
    threads: int = 1
    device: str = "cpu"
    turns: int = 5
    messages: int = 3

    name: ClassVar[str] = "codecs"
    summary: ClassVar[str] = "time to encode and decode a message, and where that pays"
    columns: ClassVar[Mapping[str, str]] = {
        "codec": "{codec}",
        "width": "{width}",
        "bytes of bfloat16's": "{bytes_ratio:.3f}",
        "error": "{error:.4f}",
        "encode ms": "{encode_ms:.2f}",
        "decode ms": "{decode_ms:.2f}",
        "pays below Mb/s": "{pays_below_mbit:,.0f}",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "threads", "turns", "messages"):
            require_count(name, getattr(self, name))

    def answer(self, say: Say) -> list[Row]:
        """A row for each codec and width; ``error`` is the share of a row's squared norm that is
        lost."""
        from paci.train.config import load_config
        from paci.train.setup import require_devices

        device = require_devices(load_config(None, {"device": self.device}), 1)
        rows: list[Row] = []
        try:
            with on_threads(self.threads):
                for width in numbers("widths", self.widths):
                    say(f"width {width}")
                    rows += self._rows(width, device)
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept")
            rows.append({"problem": "interrupted", "interrupted": True})
        return rows

    def _rows(self, width: int, device: str) -> list[Row]:
        import torch

        from paci.runtime.transport.channel import Bundle
        from paci.runtime.transport.codecs.codec_registry import make_codecs
        from paci.runtime.transport.codecs.coder import MessageCoder
        from paci.schedule.action import Message, Payload

        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(self.rows, width, generator=generator).bfloat16().to(device)
        message = Message(Payload.ACTIVATION, 1, 0)
        coders: dict[str, MessageCoder] = {}
        sent: dict[str, Bundle] = {}
        samples_s: dict[str, dict[str, list[float]]] = {}
        for spec in self.codecs.split():
            coders[spec] = MessageCoder(make_codecs(spec), seed=0)
            sent[spec] = Bundle(*coders[spec].encode(message, (rows,), None, 0))
            samples_s[spec] = {"encode": [], "decode": []}
        for turn in range(self.turns + 1):
            for spec, coder in coders.items():
                runs: dict[str, Callable[[], object]] = {
                    "encode": partial(coder.encode, message, (rows,), None, 0),
                    "decode": partial(coder.decode, message, sent[spec]),
                }
                for what, run in runs.items():
                    took_s = mean_s(run, self.messages, device)
                    if turn:  # the first one warms up
                        samples_s[spec][what].append(took_s)
        found: list[Row] = []
        for spec, coder in coders.items():
            lost = (coder.decode(message, sent[spec])[0].float() - rows.float()).square().sum(1)
            own_bytes = sum(each.numel() * each.element_size() for each in sent[spec])
            times_s = {what: statistics.median(each) for what, each in samples_s[spec].items()}
            row: dict[str, Any] = {
                "codec": spec,
                "width": width,
                "threads": self.threads,
                "device": device,
                "bytes_ratio": own_bytes / (2 * rows.numel()),
                "error": float((lost / rows.float().square().sum(1)).mean()),
                "encode_ms": 1e3 * times_s["encode"],
                "decode_ms": 1e3 * times_s["decode"],
                "samples_s": samples_s[spec],
            }
            saved_bits = 8 * (2 * rows.numel() - own_bytes)
            row["pays_below_mbit"] = saved_bits / 1e6 / sum(times_s.values())
            found.append(row)
        return found
