"""Checks manifests strictly: no unknown field, every required one, every type.

Kubernetes' own objects are checked against the model classes of the `kubernetes` package, which are generated from its
OpenAPI schema; the JobSet around them against its fields of v1alpha2, written down here.
"""

import re
from typing import Any

ENUMS = {
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "reason": {
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    },
}
# Field -> type; a star marks the required ones. A dict is an object, a list of one type a list, "V1..." one of
# Kubernetes' own, and "enum:..." one of ENUMS.
JOBSET = {
    "apiVersion*": str,
    "kind*": str,
    "metadata*": "V1ObjectMeta",
    "spec*": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name*": str,
                    "action*": "enum:action",
                    "onJobFailureReasons": ["enum:reason"],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs*": [{"name*": str, "replicas": int, "template*": "V1JobTemplateSpec"}],
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
}


class Misfit(Exception):
    """What is wrong, and where."""


def check_jobset(manifest: Any) -> None:
    """Raises Misfit unless the manifest is a JobSet that a cluster would take."""
    check(manifest, JOBSET, "jobset")
    if (manifest["apiVersion"], manifest["kind"]) != ("jobset.x-k8s.io/v1alpha2", "JobSet"):
        raise Misfit(f"{manifest['apiVersion']} {manifest['kind']} is no JobSet")


def check(value: Any, schema: Any, path: str) -> None:
    """Raises Misfit unless the value fits the schema."""
    if isinstance(schema, dict):
        _check_object(value, schema, path)
    elif isinstance(schema, list):
        _expect(value, list, path)
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    elif isinstance(schema, type):
        _expect(value, schema, path)
    elif schema.startswith("enum:"):
        if value not in ENUMS[schema.removeprefix("enum:")]:
            raise Misfit(f"{path}: {value!r} is not allowed")
    else:
        _check_model(value, schema, path)


def _check_object(value: Any, schema: dict[str, Any], path: str) -> None:
    _expect(value, dict, path)
    types = {name.rstrip("*"): kind for name, kind in schema.items()}
    missing = {name.rstrip("*") for name in schema if name.endswith("*")} - set(value)
    if missing:
        raise Misfit(f"{path}: {sorted(missing)} is missing")
    for key, item in value.items():
        if key not in types:
            raise Misfit(f"{path}: {key} is unknown")
        check(item, types[key], f"{path}.{key}")


def _check_model(value: Any, name: str, path: str) -> None:
    """Against a type as the package writes it: a model's name, str, List[...], Dict[str, ...] or object."""
    if name == "object":
        return
    if inner := re.fullmatch(r"[Ll]ist\[(.+)\]", name):
        _expect(value, list, path)
        for index, item in enumerate(value):
            _check_model(item, inner[1], f"{path}[{index}]")
    elif inner := re.fullmatch(r"[Dd]ict[(\[]str, (.+)[)\]]", name):
        _expect(value, dict, path)
        for key, item in value.items():
            _expect(key, str, path)
            _check_model(item, inner[1], f"{path}.{key}")
    elif name in ("str", "int", "bool", "float"):
        _expect(value, {"str": str, "int": int, "bool": bool, "float": float}[name], path)
    else:
        _check_fields(value, name, path)


def _check_fields(value: Any, name: str, path: str) -> None:
    from kubernetes.client import models

    model = getattr(models, name)
    _expect(value, dict, path)
    fields = {key: attribute for attribute, key in model.attribute_map.items()}
    for key, item in value.items():
        if key not in fields:
            raise Misfit(f"{path}: {key} is unknown to {name}")
        _check_model(item, model.openapi_types[fields[key]], f"{path}.{key}")
    try:
        model(**{fields[key]: item for key, item in value.items()})
    except ValueError as error:  # the model's own checks: what is required, and ranges
        raise Misfit(f"{path}: {error}") from None


def _expect(value: Any, expected: type, path: str) -> None:
    if type(value) is not expected:
        raise Misfit(f"{path}: {value!r} is a {type(value).__name__}, not a {expected.__name__}")
