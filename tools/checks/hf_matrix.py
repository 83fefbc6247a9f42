"""Every family in every shape at three layouts: logits against transformers, and back bit for bit.

    python -m tools.checks.hf_matrix [--out tools/checks/hf_matrix.md]

Each model is made by transformers with random weights, imported, loaded at TP1, TP2 with sequence
parallelism, and TP2 x PP2, and its logits (fp32) compared with transformers' own; then it is
exported, and every tensor of that folder compared with the first one's, bit for bit.  Takes some
minutes of two CPU cores; ends with 1 if a bound is broken.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import warnings
from pathlib import Path

BOUND = 1e-5


def main() -> int:
    """Run the matrix; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table into this file")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        text, ok = run(Path(folder))
    print(text)
    if args.out is not None:
        args.out.write_text(text)
    return 0 if ok else 1


def run(folder: Path) -> tuple[str, bool]:
    """The table, and whether every bound was kept."""
    import torch
    import transformers

    from litespark.checkpoint.folder import find_checkpoint
    from litespark.checkpoint.hf.export import export_checkpoint
    from litespark.checkpoint.hf.import_ import Importing, import_hf
    from litespark.training.single import single_process
    from tests.support.spawn import run_distributed
    from tools.checks.hf_cases import LAYOUTS, all_cases, differing_tensors, make
    from tools.checks.hf_cases import largest_differences_rank as compute

    cases = all_cases(folder)
    for case in cases:
        make(case)
        import_hf(case.hf, case.imported, Importing())
    found = {}
    for name, layout in LAYOUTS.items():
        world_size = layout.get("tensor", 1) * layout.get("pipeline", 1)
        results = run_distributed(compute, world_size, cases, layout, timeout_seconds=3000)
        found[name] = {
            key: max(result[key] for result in results if key in result) for key in results[-1]
        }
    with single_process():
        for case in cases:
            export_checkpoint(find_checkpoint(case.imported), Path(case.folder) / "exported")
    rows, ok = [], True
    for case in cases:
        differing = differing_tensors(case.hf, Path(case.folder) / "exported")
        values = [found[name][case.folder] for name in LAYOUTS]
        ok = ok and not differing and max(values) < BOUND
        cells = [case.family, case.variant, *(f"{value:.1e}" for value in values)]
        rows.append("| " + " | ".join([*cells, f"{len(differing)}"]) + " |")
    head = ["family", "shape", *LAYOUTS, "tensors that differ after export"]
    text = (
        f"""\
# Hugging Face in and out: all families, shapes and layouts

`python -m tools.checks.hf_matrix`, {platform.machine()}, torch {torch.__version__}, transformers
{transformers.__version__}, fp32.  Largest difference of logits from those of transformers over the
largest logit, of 2 texts of 40 random tokens; bound {BOUND:g}.  TP2 is with sequence parallelism.

| {" | ".join(head)} |
|{"---|" * len(head)}
"""
        + "\n".join(rows)
        + f"\n\n{len(cases)} models, {'all within' if ok else 'NOT all within'} the bound.\n"
    )
    return text, ok


if __name__ == "__main__":
    sys.exit(main())
