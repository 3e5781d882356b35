"""The files of deploy/, held against their schemas and against the code whose names, ports and options they use."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import capfilt
from capfilt import cli
from capfilt.cli import jobs as cli_jobs
from capfilt.cluster import ray_jobs as cluster_jobs
from capfilt.inference.captioners.endpoint.spec import EndpointSpec
from capfilt.inference.captioners.spec import captioner_spec

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
IMAGE = f"registry.example.org/capfilt:{capfilt.__version__}"
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
SHARED = "/mnt/capfilt"


def loaded(name: str) -> dict[str, Any]:
    result: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return result


# ---- commands, in whatever file ----


def commands(text: str, program: str) -> Iterator[list[str]]:
    """Every command line of `program` in a shell script, a fenced block, a comment or a YAML of one-line commands."""
    joined = re.sub(r"\\\n\s*#?", " ", text)
    for line in joined.splitlines():
        for piece in re.split(r"&&|\|\||;|\s&\s*$|\s\|\s", line):
            result = re.match(rf"^[\s#>-]*(?:RUN )?(?:\w+=\S+ )*{program} (.*)$", piece)
            if result:
                yield shlex.split(re.sub(r"\s2?> \S+", "", result[1]), comments=True)


def every_text() -> dict[str, str]:
    """What people copy commands from, by name; folded YAML strings on one line."""
    files = [*DEPLOY.glob("*.yaml"), *DEPLOY.glob("kuberay/*.yaml"), DEPLOY / "slurm.sh", DEPLOY / "Dockerfile"]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    blocks = re.findall(
        r"^```bash(?: local)?\n(.*?)^```$", (ROOT / "docs/cluster.md").read_text(), re.DOTALL | re.MULTILINE
    )
    texts["docs/cluster.md"] = "\n".join(blocks)
    texts["entrypoint"] = loaded("kuberay/rayjob.yaml")["spec"]["entrypoint"]
    node = loaded("ray-cluster.yaml")
    texts["start"] = "\n".join([*node["head_start_ray_commands"], *node["worker_start_ray_commands"]])
    return texts


def test_every_command_of_capfilt_is_one_that_it_takes() -> None:
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    seen = []
    for name, text in every_text().items():
        for words in commands(text, "capfilt"):
            if words[0].isupper() or words[0].startswith("$"):  # VERB, "$verb"
                continue
            assert words[0] in verbs, (name, words)
            made = verbs[words[0]].make_context(words[0], list(words[1:]))
            for path in (made.params.get("out"), made.params.get("run")):
                assert path is None or str(path).startswith((SHARED, "/shared/")), (name, words)
            seen.append((name, words[0]))
    assert {name for name, _ in seen} >= {"docs/cluster.md", "entrypoint", "deploy/ray-cluster.yaml"}
    assert {verb for _, verb in seen} >= {"bootstrap", "select", "jobs", "status"}


def test_every_command_of_ray_is_one_that_it_takes() -> None:
    from ray.scripts import scripts

    seen = []
    for name, text in every_text().items():
        for words in commands(text, "ray"):
            command = scripts.cli.commands[words[0]]
            if words[0] not in ("up", "down", "dashboard"):
                command.make_context(words[0], list(words[1:]))
            seen.append((name, words[0]))
    assert ("start", "start") in seen
    assert ("docs/cluster.md", "start") in seen


def test_slurm_s_options_of_ray_are_those_of_ray_start() -> None:
    from ray.scripts import scripts

    text = (DEPLOY / "slurm.sh").read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"ray symmetric-run (.*)", text)[1])  # type: ignore[index]
    options = [word.split("=")[0] for word in words[: words.index("--")] if word.startswith("--")]
    known = {name for parameter in scripts.start.params for name in parameter.opts}
    assert set(options) <= known | {"--min-nodes"}
    assert words[words.index("--") + 1 :] == ["capfilt", "$verb", "--address", "auto", "$@"]


def test_the_slurm_script_is_sound() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sh"], check=True)
    done = subprocess.run(["bash", DEPLOY / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: sbatch deploy/slurm.sh VERB ARGUMENTS")


@pytest.mark.parametrize(("linter", "file"), [("shellcheck", "slurm.sh"), ("hadolint", "Dockerfile")])
def test_the_linters_find_nothing(linter: str, file: str) -> None:
    program = shutil.which(linter, path=str(Path(sys.executable).parent)) or shutil.which(linter)
    if program is None:
        pytest.skip(f"{linter} is not installed")
    done = subprocess.run([program, DEPLOY / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ---- the image ----


def test_the_image_is_made_of_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert all((ROOT / source).exists() for source in sources)
    assert {f"!{source}" for source in sources} == {line for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["build-system"]["requires"] + ["s3fs", "boto3", "torch"]
    assert all(re.split(r"[>=]", name)[0] in PINS for name in needed)
    python = re.search(r"CPython ([\d.]+)", (ROOT / "constraints.txt").read_text())
    assert python
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == [f"python:{python[1]}-slim-bookworm"] * 2
    assert f"-t {IMAGE} ." in text
    user, *rest = text[text.rindex("USER") :].splitlines()
    assert user == "USER 1000"
    assert not [line for line in rest if line.startswith(("RUN", "USER", "COPY"))]
    assert r'export PATH=/opt/capfilt/bin:\$PATH" > /etc/profile.d/capfilt.sh' in text  # of login shells


# ---- Ray's autoscaler ----


def test_ray_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(loaded("ray-cluster.yaml"))
    validate_config(config)
    assert config["docker"]["image"] == IMAGE
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert sum(kind["max_workers"] for kind in config["available_node_types"].values()) == config["max_workers"]
    assert f"--volume={SHARED}:{SHARED}" in config["docker"]["run_options"]


# ---- KubeRay ----

# Fields of ray.io/v1, as KubeRay 1.6's API reference names them. The definition itself is in no package to install.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "cluster": {
        "rayVersion": str, "authOptions": dict, "enableInTreeAutoscaling": bool, "autoscalerOptions": dict,
        "headGroupSpec": dict, "workerGroupSpecs": list, "gcsFaultToleranceOptions": dict, "suspend": bool,
        "managedBy": str, "headServiceAnnotations": dict,
    },
    "autoscaler": {
        "version": str, "upscalingMode": str, "idleTimeoutSeconds": int, "resources": dict, "image": str,
        "imagePullPolicy": str, "securityContext": dict, "env": list, "envFrom": list, "volumeMounts": list,
    },
    "head": {
        "rayStartParams": dict, "template": dict, "headService": dict, "enableIngress": bool, "serviceType": str,
    },
    "worker": {
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": dict,
        "template": dict, "numOfHosts": int, "idleTimeoutSeconds": int, "scaleStrategy": dict, "suspend": bool,
    },
    "job": {
        "entrypoint": str, "runtimeEnvYAML": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int, "rayClusterSpec": dict, "activeDeadlineSeconds": int, "jobId": str,
        "submissionMode": str, "submitterPodTemplate": dict, "clusterSelector": dict, "metadata": dict, "suspend": bool,
        "entrypointNumCpus": (int, float), "entrypointNumGpus": (int, float), "entrypointResources": str,
    },
}  # fmt: skip


def check_fields(kind: str, result: dict[str, Any]) -> None:
    for name, value in result.items():
        assert name in FIELDS[kind], f"{kind} has no field {name}"
        assert isinstance(value, FIELDS[kind][name]), f"{kind}.{name} is {value!r}"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    result: dict[str, Any] = loaded("kuberay/raycluster.yaml")["spec"]
    return result


@pytest.fixture(scope="module")
def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The pod of each group."""
    groups = {"head": cluster["headGroupSpec"], **{each["groupName"]: each for each in cluster["workerGroupSpecs"]}}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_the_cluster_s_fields_are_kuberay_s(cluster: dict[str, Any]) -> None:
    whole = loaded("kuberay/raycluster.yaml")
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayCluster")
    check_fields("cluster", cluster)
    check_fields("autoscaler", cluster["autoscalerOptions"])
    check_fields("head", cluster["headGroupSpec"])
    for worker in cluster["workerGroupSpecs"]:
        check_fields("worker", worker)
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["autoscalerOptions"]["upscalingMode"] in ("Default", "Aggressive", "Conservative")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == PINS["ray"] == importlib.metadata.version("ray")


def test_the_job_runs_on_the_same_cluster(cluster: dict[str, Any]) -> None:
    whole = loaded("kuberay/rayjob.yaml")
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayJob")
    check_fields("job", whole["spec"])
    assert whole["spec"]["rayClusterSpec"] == cluster
    environment = yaml.safe_load(whole["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": str(cluster_jobs.GRACE)}
    # An entrypoint's GPU workers are not there when it begins: it says how many.
    assert "--address auto" in whole["spec"]["entrypoint"]
    assert "cluster.annotate.workers=" in whole["spec"]["entrypoint"]


def test_the_captioner_is_an_application_of_ray_serve(cluster: dict[str, Any]) -> None:
    """Its keys are those of the installed Ray's own classes, read and not imported: Ray Serve is no requirement."""
    whole = loaded("kuberay/rayservice.yaml")
    assert (whole["apiVersion"], whole["kind"]) == ("ray.io/v1", "RayService")
    assert whole["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    ray_cluster = whole["spec"]["rayClusterConfig"]
    check_fields("cluster", ray_cluster)
    check_fields("head", ray_cluster["headGroupSpec"])
    (worker,) = ray_cluster["workerGroupSpecs"]
    check_fields("worker", worker)
    assert ray_cluster["rayVersion"] == cluster["rayVersion"]
    for group in (ray_cluster["headGroupSpec"], worker):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].startswith(f"rayproject/ray-llm:{cluster['rayVersion']}-")
    (application,) = yaml.safe_load(whole["spec"]["serveConfigV2"])["applications"]
    module, _, function = application["import_path"].partition(":")
    ray_folder = Path(importlib.metadata.distribution("ray").locate_file("ray").__fspath__())
    builders = ray_folder.parent / module.replace(".", "/") / "__init__.py"
    assert f"def {function}(" in builders.read_text()
    classes = ray_folder / "llm/_internal/serve/core/configs/llm_config.py"
    tree = {node.name: node for node in ast.walk(ast.parse(classes.read_text())) if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> set[str]:
        return {each.target.id for each in tree[name].body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]

    (model,) = application["args"]["llm_configs"]
    assert model.keys() <= fields("LLMConfig")
    assert model["model_loading_config"].keys() <= fields("ModelLoadingConfig")
    text = (DEPLOY / "kuberay/rayservice.yaml").read_text()
    (words,) = (words for words in commands(text, "capfilt") if words[0] == "annotate")
    spec = captioner_spec(words[words.index("--captioner") + 1])
    assert isinstance(spec, EndpointSpec)
    assert spec.model == model["model_loading_config"]["model_id"]
    assert spec.url == f"http://{whole['metadata']['name']}-serve-svc:8000/v1"


def test_ray_start_s_parameters_are_options_of_ray_start(cluster: dict[str, Any]) -> None:
    from ray.scripts import scripts

    known = {name for parameter in scripts.start.params for name in parameter.opts}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        shm = next(volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm")
        assert int(group["rayStartParams"]["object-store-memory"]) < 2 * 2**30
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_pods_hold_what_capfilt_needs(pods: dict[str, dict[str, Any]]) -> None:
    claim = loaded("kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods.values():
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"shared": SHARED, "shm": "/dev/shm", "scratch": "/tmp"}
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        # A job that is stopped, or a `ray stop`, has this long before Kubernetes kills.
        assert pod["terminationGracePeriodSeconds"] > cluster_jobs.GRACE
        assert pod["securityContext"]["runAsNonRoot"]
    assert pods["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in str(pods["head"]) + str(pods["cpu"])
    assert {rule["key"] for rule in pods["gpu"]["tolerations"]} >= {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert not {"tolerations"} & (pods["head"].keys() | pods["cpu"].keys())


def test_kubernetes_takes_the_pods_and_the_claim(pods: dict[str, dict[str, Any]]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    assert pods.keys() == {"head", "cpu", "gpu"}
    for name, pod in pods.items():
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod}, "1.34", strict=True)
    validate(loaded("kuberay/storage.yaml"), "1.34", strict=True)
    service = loaded("kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (service["headGroupSpec"], *service["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        validate(pod, "1.34", strict=True)


def test_the_probes_ask_where_ray_answers(pods: dict[str, dict[str, Any]]) -> None:
    from ray.dashboard.modules.reporter import healthz_agent, reporter_head
    from ray.dashboard.utils import ray_constants

    def asked(pod: str) -> tuple[str, int]:
        get = pods[pod]["containers"][0]["livenessProbe"]["httpGet"]
        return get["path"], get["port"]

    head, agent = (Path(module.__file__ or "").read_text() for module in (reporter_head, healthz_agent))
    path, port = asked("head")
    assert f'"{path}"' in head
    assert port == ray_constants.DEFAULT_DASHBOARD_PORT
    for pod in ("cpu", "gpu"):
        path, port = asked(pod)
        assert f'"{path}"' in agent
        assert port == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    dashboard = inspect.signature(cli_jobs.jobs).parameters["address"].default
    assert dashboard.endswith(f":{ray_constants.DEFAULT_DASHBOARD_PORT}")
