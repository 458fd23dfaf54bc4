"""The rows that every benchmark writes, as JSON (with the run's facts on top) and as CSV (the same rows, flat).

| column | meaning |
|---|---|
| kernel | what was measured: encoder, gemm, sparse, attention, padding, heads, sentences, importance, \
hessian, qbert, demo |
| provider | the engine, or `SLOW / FAST` for a ratio |
| metric | latency_ms, ratio, share_of_peak, break_even, time_share, gmac_s, gb_s, sentences_s, spearman, \
accuracy, size_mb, memory_mb, encoder_mb, cost, minutes |
| x_name, x_value | the axis: "batch x tokens" 1x128, "M x N x K, epilogue" 128x768x3072 bf16, \
"M x N x K, block@zeros" 128x768x3072 16x4@0.8 |
| median, p20, p80 | over accepted turns |
| config | JSON: threads, isa, padding, rounds, accepted share, agreement with fp32 torch |
| device | processor, cores |
| versions | JSON: package versions of the provider |
| date | UTC, ISO 8601 |
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One measured number with its spread."""

    kernel: str
    provider: str
    metric: str
    x_name: str
    x_value: str
    median: float
    p20: float
    p80: float
    config: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""


@dataclass
class Run:
    """The rows of one interleaved run and the facts they share."""

    name: str
    device: str
    isa: str
    threads: int
    facts: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        kernel: str,
        provider: str,
        metric: str,
        x: tuple[str, str],
        values: tuple[float, float, float],
        config: dict[str, Any] | None = None,
        versions: dict[str, str] | None = None,
    ) -> Row:
        """Appends a row; `values` is (median, p20, p80)."""
        rounded = [float(f"{v:.5g}") for v in values]
        shared = {"threads": self.threads, "isa": self.isa}
        row = Row(
            kernel, provider, metric, *x, *rounded, shared | (config or {}), self.device, versions or {}, self.date
        )
        self.rows.append(row)
        return row

    def find(self, provider: str, metric: str, x_value: str) -> Row | None:
        """The row of a provider, or None."""
        for row in self.rows:
            if (row.provider, row.metric, row.x_value) == (provider, metric, x_value):
                return row
        return None

    def x_values(self, metric: str) -> list[str]:
        """The points of the axis that have this metric, in order of measurement."""
        return list(dict.fromkeys(row.x_value for row in self.rows if row.metric == metric))

    def providers(self, metric: str) -> list[str]:
        """The providers that have this metric, in order of measurement."""
        return list(dict.fromkeys(row.provider for row in self.rows if row.metric == metric))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, folder: Path) -> list[Path]:
        """Writes `folder/<name>.json` and `.csv`, replacing an earlier run of that name; returns both paths."""
        folder.mkdir(parents=True, exist_ok=True)
        as_json = folder / f"{self.name}.json"
        as_json.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        as_csv = folder / f"{self.name}.csv"
        with as_csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            columns = [f.name for f in fields(Row)]
            writer.writerow(columns)
            for row in self.rows:
                values = asdict(row)
                writer.writerow(
                    [json.dumps(v, sort_keys=True) if isinstance(v, dict) else v for v in map(values.get, columns)]
                )
        return [as_json, as_csv]


def load(path: Path) -> Run:
    """Reads a JSON file that `Run.save` wrote. Raises ValueError for a file of another shape."""
    try:
        data = json.loads(path.read_text())
        rows = [Row(**row) for row in data.pop("rows")]
        return Run(rows=rows, **data)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected the JSON of a benchmark run. Got {error}.") from error
