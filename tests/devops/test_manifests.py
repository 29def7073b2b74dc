"""What is deployed says what it must: Dockerfile, compose file and Kubernetes manifests.

Their structure only, for there is no container engine here; their commands are run by
test_commands.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyworkflow._duration import parse_duration
from tests.repo.clone import ROOT

DEVOPS = ROOT / "devops"
COMPOSE = yaml.safe_load((DEVOPS / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MANIFESTS = {
    path.name: list(yaml.safe_load_all(path.read_text("utf-8")))
    for path in sorted(DEVOPS.glob("kubernetes/*.yaml"))
}
OBJECTS = [each for found in MANIFESTS.values() for each in found]
DEPLOYMENTS = [each for each in OBJECTS if each["kind"] == "Deployment"]
OURS = ("worker", "beat", "flower")
DRAIN_BEYOND = 15  # seconds that a drain may take beyond its grace, see _process.py


def instructions() -> Iterator[tuple[int, str, str]]:
    """Stage, instruction and its arguments, of every line of the Dockerfile."""
    text = (DEVOPS / "Dockerfile").read_text("utf-8")
    text = "".join(line for line in text.splitlines(True) if not line.lstrip().startswith("#"))
    stage = -1
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            stage += name == "FROM"
            yield stage, name, rest.strip()


def last_stage(name: str) -> list[str]:
    found = list(instructions())
    return [rest for stage, its, rest in found if its == name and stage == found[-1][0]]


def seconds(text: str) -> float:
    return parse_duration(text).total_seconds()


# --- Dockerfile ---------------------------------------------------------------------------------


def test_the_image_is_built_in_stages_and_runs_as_nobody_in_particular() -> None:
    assert len([1 for _, name, _ in instructions() if name == "FROM"]) == 2
    (user,) = last_stage("USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)  # numbers: Kubernetes checks them
    after = [name for _, name, _ in instructions()]
    assert "RUN" not in after[after.index("USER") :]


def test_signals_reach_celery() -> None:
    (entry,), (command,) = last_stage("ENTRYPOINT"), last_stage("CMD")
    assert json.loads(entry) == ["tini", "--"]  # exec form: no shell between
    assert json.loads(command)[:3] == ["celery", "-A", "pyworkflow.celery.app"]
    assert last_stage("STOPSIGNAL") == ["SIGTERM"]


def test_all_that_is_copied_is_there_and_not_ignored() -> None:
    given = {
        rest.partition("=")[0]: rest.partition("=")[2]
        for _, name, rest in instructions()
        if name == "ARG"
    }
    ignored = (DEVOPS / "Dockerfile.dockerignore").read_text("utf-8").split()
    copied = [rest.split() for _, name, rest in instructions() if name == "COPY"]
    for words in copied:
        if words[0].startswith("--from="):
            continue
        for source in words[:-1]:
            path = re.sub(r"\$\{(\w+)\}", lambda found: given[found[1]], source)
            assert (ROOT / path).exists(), source
            assert path.split("/")[0] not in ignored
    assert {words[-1] for words in copied if words[0] == "--from=build"} == {
        "/opt/pyworkflow",
        "/srv/app",
    }


def test_the_image_has_every_distribution_and_extra_that_is_there() -> None:
    builds = [rest for _, name, rest in instructions() if name == "RUN" and "pip install" in rest]
    from_clone = builds[0].partition("else")[2]
    from_index = builds[0].partition("else")[0]
    for path in ROOT.glob("pyworkflow-*/pyproject.toml"):
        if path.parent.name == "pyworkflow-conformance":
            continue  # proves backends and executors; no part of production
        assert f"./{path.parent.name}" in from_clone
        assert re.search(rf"{path.parent.name}(\[\S+\])?==", from_index)
    assert "-c constraints.txt" in from_clone


# --- compose ------------------------------------------------------------------------------------


def test_the_stack_is_the_one_that_the_readme_promises() -> None:
    assert set(SERVICES) == {"redis", "postgres", *OURS}
    assert SERVICES["worker"]["deploy"]["replicas"] == 3
    for name in OURS:
        words = shlex.split(SERVICES[name]["command"])
        assert words[:4] == ["celery", "-A", "pyworkflow.celery.app", name]
    for place in ("redis", "postgres", "flower"):  # a laptop's network is not trusted
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[place]["ports"])


def test_every_service_of_ours_is_built_here_and_waits_for_what_it_needs() -> None:
    for name in OURS:
        service = SERVICES[name]
        build = service["build"]
        context = (DEVOPS / build["context"]).resolve()
        assert context == ROOT.resolve()
        assert (context / build["dockerfile"]).is_file()
        for other, how in service["depends_on"].items():
            assert how == {"condition": "service_healthy"}
            assert SERVICES[other]["healthcheck"]["test"]
    assert set(COMPOSE["volumes"]) == {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", ())
    }


@pytest.mark.parametrize("name", OURS)
def test_modules_store_and_broker_of_the_stack_exist(name: str) -> None:
    variables = {
        key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        for key, value in SERVICES[name]["environment"].items()
    }
    app = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", SERVICES[name]["build"]["args"]["APP"])
    for module in variables["PYWORKFLOW_MODULES"].split(","):
        assert (ROOT / app / f"{module}.py").is_file()
    assert variables["PYWORKFLOW_EXECUTOR"] == "celery://"
    assert re.search(r"@postgres:5432/pyworkflow$", variables["PYWORKFLOW_STORAGE"])
    assert variables["PYWORKFLOW_BROKER_URL"].startswith("redis://redis:6379")
    assert SERVICES["postgres"]["environment"]["POSTGRES_DB"] == "pyworkflow"


def test_compose_waits_longer_than_a_worker_drains() -> None:
    worker = SERVICES["worker"]
    drain = seconds(worker["environment"]["PYWORKFLOW_DRAIN"])
    assert seconds(worker["stop_grace_period"]) > drain + DRAIN_BEYOND


def test_the_broker_never_evicts() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


# --- Kubernetes ---------------------------------------------------------------------------------


def test_every_manifest_has_its_version_kind_and_name() -> None:
    versions = {
        "Kustomization": "kustomize.config.k8s.io/v1beta1",
        "ConfigMap": "v1",
        "Secret": "v1",
        "Service": "v1",
        "Deployment": "apps/v1",
        "PodDisruptionBudget": "policy/v1",
        "HorizontalPodAutoscaler": "autoscaling/v2",
        "ScaledObject": "keda.sh/v1alpha1",
        "TriggerAuthentication": "keda.sh/v1alpha1",
    }
    for each in OBJECTS:
        assert each["apiVersion"] == versions[each["kind"]]
        assert each["kind"] == "Kustomization" or each["metadata"]["name"]
    listed = MANIFESTS["kustomization.yaml"][0]["resources"]
    assert set(listed) == set(MANIFESTS) - {"kustomization.yaml", "hpa.yaml", "keda.yaml"}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["metadata"]["name"])
def test_a_deployment_selects_its_own_pods_and_grants_them_nothing(
    deployment: dict[str, Any],
) -> None:
    spec = deployment["spec"]
    pod = spec["template"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert last_stage("USER") == ["{runAsUser}:{runAsGroup}".format_map(pod["securityContext"])]
    (container,) = pod["containers"]
    assert container["args"][:3] == ["celery", "-A", "pyworkflow.celery.app"]
    assert "command" not in container  # it would replace tini
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    names = {(each["kind"], each["metadata"]["name"]) for each in OBJECTS if "metadata" in each}
    for source in container["envFrom"]:
        kind = "ConfigMap" if "configMapRef" in source else "Secret"
        assert (kind, source[kind[0].lower() + kind[1:] + "Ref"]["name"]) in names


def test_what_speaks_of_a_deployment_means_one_that_is_here() -> None:
    names = {each["metadata"]["name"] for each in DEPLOYMENTS}
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in DEPLOYMENTS]
    for each in OBJECTS:
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject"):
            assert each["spec"]["scaleTargetRef"]["name"] in names
        if each["kind"] == "Service":
            assert any(each["spec"]["selector"].items() <= its.items() for its in labels)
        if each["kind"] == "PodDisruptionBudget":
            selector = each["spec"]["selector"]["matchLabels"]
            assert any(selector.items() <= its.items() for its in labels)


def test_kubernetes_waits_longer_than_a_worker_drains() -> None:
    (worker, _) = MANIFESTS["worker.yaml"]
    drain = seconds(MANIFESTS["configmap.yaml"][0]["data"]["PYWORKFLOW_DRAIN"])
    assert worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > (
        drain + DRAIN_BEYOND
    )


def test_there_is_one_beat() -> None:
    (beat,) = MANIFESTS["beat.yaml"]
    assert beat["spec"]["replicas"] == 1
    assert beat["spec"]["strategy"] == {"type": "Recreate"}


def test_settings_of_the_manifests_are_settings() -> None:
    from dataclasses import fields

    from pyworkflow.worker import Settings

    known = {f"PYWORKFLOW_{field.name.upper()}" for field in fields(Settings)}
    known.add("PYWORKFLOW_HEARTBEAT")
    given = {
        *MANIFESTS["configmap.yaml"][0]["data"],
        *MANIFESTS["secret.yaml"][0]["stringData"],
        *(name for service in OURS for name in SERVICES[service]["environment"]),
        *re.findall(r"PYWORKFLOW_[A-Z_]+(?==)", " ".join(last_stage("ENV"))),
    }
    assert given <= known


def test_no_page_or_manifest_of_the_deployment_names_a_real_place() -> None:
    for path in (*DEVOPS.rglob("*"), ROOT / "DISTRIBUTED.md"):
        if path.is_file():
            hosts = re.findall(r"https?://([\w.-]+)", path.read_text("utf-8"))
            assert set(hosts) <= {"127.0.0.1", "localhost"}, path


def test_paths_of_the_image_agree() -> None:
    heartbeat = re.search(r"PYWORKFLOW_HEARTBEAT=(\S+)", " ".join(last_stage("ENV")))
    assert heartbeat is not None
    assert MANIFESTS["configmap.yaml"][0]["data"]["PYWORKFLOW_HEARTBEAT"] == heartbeat[1]
    assert Path(heartbeat[1]).parent == Path("/tmp")
    assert last_stage("WORKDIR") == ["/srv/app"]
