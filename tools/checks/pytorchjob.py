"""Checks that a rendered PyTorchJob is one: against the schema that the operator itself publishes.

    kubectl kustomize launch/overlays/p5 > job.yaml
    python tools/checks/pytorchjob.py job.yaml --crd kubeflow.org_pytorchjobs.yaml

The CRD is manifests/base/crds/kubeflow.org_pytorchjobs.yaml of the Kubeflow Training Operator
(github.com/kubeflow/training-operator, branch release-1.9); it is not part of this repository.
Unknown fields are errors, as they are for `kubectl apply --validate=strict`.  Needs `jsonschema`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml


def strict(schema: Any) -> Any:
    """A Kubernetes schema as plain JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict):
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if "additionalProperties" not in schema and not open_ended:
            made["additionalProperties"] = False
    return made


def problems(job: dict[str, Any], crd: dict[str, Any]) -> list[str]:
    """What the schema says against a job, as `path: words`."""
    from jsonschema import Draft202012Validator

    group, version = job["apiVersion"].split("/")
    if group != crd["spec"]["group"] or job["kind"] != crd["spec"]["names"]["kind"]:
        return [f"kind: {job['apiVersion']} {job['kind']} is not what this CRD is for"]
    schemas = {
        entry["name"]: entry["schema"]["openAPIV3Schema"] for entry in crd["spec"]["versions"]
    }
    if version not in schemas:
        return [f"apiVersion: there is no {version}, but {', '.join(schemas)}"]
    schema = strict(schemas[version])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, not the CRD's
    found = sorted(Draft202012Validator(schema).iter_errors(job), key=lambda e: list(e.path))
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


def main() -> int:
    """Check every PyTorchJob of the file; returns 1 if one is wrong or none is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rendered", type=Path, help="what `kubectl kustomize` printed")
    parser.add_argument("--crd", type=Path, required=True, help="the operator's CRD, as YAML")
    args = parser.parse_args()
    crd = yaml.safe_load(args.crd.read_text())
    documents = [entry for entry in yaml.safe_load_all(args.rendered.read_text()) if entry]
    jobs = [entry for entry in documents if entry["kind"] == "PyTorchJob"]
    if not jobs:
        print(f"{args.rendered}: holds no PyTorchJob")
        return 1
    bad = 0
    for job in jobs:
        found = problems(job, crd)
        bad += bool(found)
        for line in found or ["valid"]:
            print(f"{args.rendered}: {job['metadata']['name']}: {line}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
