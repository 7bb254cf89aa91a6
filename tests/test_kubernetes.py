"""The manifests for Kubernetes are what Kubernetes reads, and fit the settings and paths that there are."""

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mainstay.audit import AuditSettings
from mainstay.core import Settings
from mainstay.database import DatabaseSettings
from mainstay.events import EventsSettings
from mainstay.observability import ObservabilitySettings

yaml: Any = importlib.import_module("yaml")
kubernetes_validate: Any = importlib.import_module("kubernetes_validate")

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
VERSION = "1.37"
SETTINGS: tuple[type[Settings], ...] = (AuditSettings, DatabaseSettings, EventsSettings, ObservabilitySettings)
DRAIN_SECONDS, END_SECONDS = 30, 15  # of App, and of a process after it
APPLICATION_PROCESSES = {"Deployment", "Job"}


def manifests() -> Iterator[dict[str, Any]]:
    for file in FILES:
        yield from yaml.safe_load_all(file.read_text())


def valid(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


@pytest.mark.parametrize("manifest", list(manifests()), ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_kubernetes_reads_it(manifest: dict[str, Any]) -> None:
    """By its own schemas, in which an unknown field is an error."""
    valid(manifest)


def test_an_unknown_field_is_noticed() -> None:
    """The test above can fail."""
    manifest = copy.deepcopy(next(each for each in manifests() if each["kind"] == "Deployment"))
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    container["readinesProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        valid(manifest)


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for manifest in manifests():
        if manifest["kind"] in APPLICATION_PROCESSES:
            template = manifest["spec"]["template"]
            (container,) = template["spec"]["containers"]
            yield manifest["metadata"]["name"], template, container


def variables(container: dict[str, Any]) -> dict[str, str | None]:
    return {each["name"]: each.get("value") for each in container["env"]}


def test_every_variable_is_a_setting_and_every_probe_a_path() -> None:
    """A renamed setting would stop the start, a renamed path would kill the pod."""
    known = {each.variable(field) for each in SETTINGS for field in each.model_fields}
    paths = ObservabilitySettings(service_name="x").paths
    wanted = {"startupProbe": paths.startup, "livenessProbe": paths.live, "readinessProbe": paths.ready}
    for name, template, container in pods():
        said = variables(container)
        assert said.keys() <= known, name
        if "ports" not in container:
            continue
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert str(ports["probes"]) == (said.get("MAINSTAY_OBSERVABILITY_HTTP_PORT") or "9464"), name
        assert str(ports["probes"]) == template["metadata"]["annotations"]["prometheus.io/port"], name
        for probe, path in wanted.items():
            assert container[probe]["httpGet"] == {"path": path, "port": "probes"}, name


def test_a_pod_has_the_time_to_end_and_no_rights_that_it_does_not_need() -> None:
    """What comes before the drain, the drain, and the end of the process; not root, nothing to write to but /tmp."""
    for name, template, container in pods():
        spec = template["spec"]
        before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        unready = float(variables(container).get("MAINSTAY_OBSERVABILITY_NOT_READY_SECONDS") or 0)
        if "livenessProbe" in container:
            needed = before + unready + DRAIN_SECONDS + END_SECONDS
            assert spec["terminationGracePeriodSeconds"] >= needed, name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }, name  # fmt: skip
        assert "memory" in container["resources"]["limits"], name


def test_every_deployment_has_a_budget_and_spreads() -> None:
    """The selectors find the pods that they are for."""
    everything = list(manifests())
    for deployment in (each for each in everything if each["kind"] == "Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"] == labels
        (budget,) = [
            each
            for each in everything
            if each["kind"] == "PodDisruptionBudget" and each["spec"]["selector"]["matchLabels"] == labels
        ]
        assert deployment["spec"]["replicas"] > budget["spec"]["maxUnavailable"]
        affinity = deployment["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
        (term,) = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
        assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == labels
    (service,) = [each for each in everything if each["kind"] == "Service"]
    ports = {port["targetPort"] for port in service["spec"]["ports"]}
    assert ports == {"http"}, "the port of probes and metrics is for no caller outside"


def test_the_page_names_every_file() -> None:
    """What lies beside it."""
    page = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()
    assert sorted(re.findall(r"\]\((\w+\.yaml)\)", page)) == [file.name for file in FILES]
