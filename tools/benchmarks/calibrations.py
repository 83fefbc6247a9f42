"""Make the planner's built-in calibrations again from the committed results.

python -m tools.benchmarks.calibrations          # writes litespark/metering/plan/calibrations/
python -m tools.benchmarks.calibrations --check  # says whether they are what the results give
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from litespark.metering.plan.calibration import Calibration
from litespark.metering.plan.fit import Subject, fit

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[2] / "litespark" / "metering" / "plan" / "calibrations"

# Bytes a second of a large copy: `tools/benchmarks/kernels.py`, in the results of each GPU.
_H100 = {"gpu": "h100-sxm", "memory_gib": 79.1, "copy_bytes_per_second": 3.0e12}
_H200 = {"gpu": "h200-sxm", "memory_gib": 139.8, "copy_bytes_per_second": 4.22e12}

# No result of an earlier day was bound by its host, so that its rates come from this `--calibrate`:
# an H200's host, with jobs on three other GPUs beside it.
HOST = "h200-plan-calibration"

LITESPARK = {
    "h100-sxm": (
        _H100,
        [
            "h100-paper-3b-bf16",
            "h100-paper-3b-fp8-delayed-fastest",
            "h100-paper-3b-fp8-delayed-fastest-s2048",
            "h100-paper-3b-fp8-delayed-fastest-s16384",
            "h100-llama3.2-1b-bf16",
        ],
    ),
    "h200-sxm": (_H200, ["h200-paper-3b-bf16", "h200-paper-3b-fp8-delayed-fastest"]),
}


def records_of(names: list[str]) -> list[dict[str, Any]]:
    """The results of these names."""
    return [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]


def built_in() -> dict[str, Calibration]:
    """Every built-in calibration, from the results."""
    found: dict[str, Calibration] = {}
    measured = Calibration.model_validate(records_of([HOST])[0])
    host = {key: getattr(measured, key) for key in ("host_seconds_per_launch", "idle_watts")}
    for name, (subject, names) in LITESPARK.items():
        source = "tools/benchmarks/results: " + ", ".join(names)
        borrowed = ()
        if name == "h200-sxm":  # the same processors with another memory
            borrowed = found["h100-sxm"].attention
            source += "; attention at other sizes and lengths: as on the H100"
        source += (
            f"; the host's launches and idle watts: {HOST}, jobs on three other GPUs beside it"
        )
        fitted = fit(records_of(names), Subject(source=source, attention=borrowed, **subject))
        found[name] = fitted.model_copy(update=host)
    return found


def text_of(calibration: Calibration) -> str:
    """The file's text; numbers with six digits, which is more than they are worth."""
    rounded = json.loads(
        calibration.model_dump_json(), parse_float=lambda text: float(f"{float(text):.6g}")
    )
    return json.dumps(rounded, indent=1) + "\n"


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    differ = 0
    TARGET.mkdir(exist_ok=True)
    for name, calibration in built_in().items():
        path = TARGET / f"{name}.json"
        if check:
            differ += path.read_text() != text_of(calibration)
        else:
            path.write_text(text_of(calibration))
        print(text_of(calibration))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
