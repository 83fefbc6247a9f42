"""The examination of several ranks, step by step, until one makes the next impossible."""

from __future__ import annotations

import hashlib
import json

import torch.distributed as dist

from litespark.metering.doctor.finding import Finding, wrong
from litespark.metering.doctor.together import Together, format_table
from litespark.utils.facts import code_facts, package_facts


def examine(timeout_seconds: float) -> tuple[list[Finding], list[str]]:
    """All findings, the same on every rank, and the lines of the bandwidth table."""
    together = Together(timeout_seconds)
    found = together.roll_call()
    if _is_bad(found):
        return found, []
    found += together.connections()
    if _is_bad(found):
        return found, []
    code = hashlib.sha256(json.dumps(code_facts(), sort_keys=True).encode()).hexdigest()[:12]
    found += together.sameness({"code of Litespark": code, **package_facts()})
    try:
        together.join()
        found += together.clocks()
        found += together.all_reduce()
        judged, table = together.bandwidth()
    except (RuntimeError, dist.DistError) as error:
        words = str(error).splitlines()[0][:200]
        fix = "run it again with NCCL_DEBUG=INFO; on one node first, then on two at a time"
        return [*found, wrong("communication", words, fix)], []
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return found + judged, list(format_table(table, [rank.host for rank in together.ranks]))


def _is_bad(found: list[Finding]) -> bool:
    return any(finding.status == "wrong" for finding in found)
