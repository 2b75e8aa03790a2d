"""``make test-deploy``: charts and overlays rendered, each object held against Kubernetes' schemas.

    PRODUCTION_STACK=folder  a checkout of vllm-project/production-stack; else it is cloned
    LLM_D=folder             one of llm-d/llm-d; likewise
    KUBERAY=folder           one of ray-project/kuberay; likewise
    CHARTS=none              only what needs neither

kubectl renders overlays, Helm's own code charts (helm-python-sdk); kubernetes-validate has
Kubernetes' schemas, KubeRay's repository that of a RayService.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import deployed
from checkouts import CACHE, UnavailableError, checkout

TOOLS = ["helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0", "importlib-resources==6.5.2"]
KUBERNETES = "1.34"


def tools():
    """Makes helm_python and kubernetes_validate importable; what they need vLLM has brought."""
    into = CACHE / "deploy/tools"
    if not (into / "kubernetes_validate").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(into)]
        subprocess.run([*pip, *TOOLS], check=True)
    sys.path.append(str(into))


def kustomized(folder):
    if shutil.which("kubectl") is None:
        sys.exit("there is no kubectl, which renders overlays (kubectl kustomize): install it")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(done.stdout))


def charts():
    """Name → objects of production-stack's chart with each of our values."""
    import helm_python
    import jsonschema

    folder = checkout("PRODUCTION_STACK", "vllm-project/production-stack") / "helm"
    schema = yaml.safe_load((folder / "values.schema.json").read_text())
    with helm_python.Chart.load(str(folder)) as chart:
        for name, values in deployed.values_of_charts():
            jsonschema.validate(values, schema)
            rendered = chart.render(values, name="pd", namespace="serving")
            objects = [o for text in rendered.values() for o in yaml.safe_load_all(text) if o]
            yield f"production-stack, {name}", objects


def overlay():
    """The objects of llm-d's guide with our overlay."""
    checked_out = checkout("LLM_D", "llm-d/llm-d")
    with tempfile.TemporaryDirectory() as scratch:
        guides = shutil.copytree(checked_out / "guides", Path(scratch, "guides"), symlinks=True)
        ours = guides / "pd-disaggregation/modelserver/gpu/vllm/kvconnect"
        shutil.copytree(deployed.DEPLOY / "llm-d", ours)
        return kustomized(ours)


def ray_service():
    """The RayService; its own schema is KubeRay's, its pods' that of Kubernetes."""
    import jsonschema
    import kubernetes_validate

    folder = checkout("KUBERAY", "ray-project/kuberay") / "helm-chart/kuberay-operator/crds"
    crd = yaml.safe_load((folder / "ray.io_rayservices.yaml").read_text())
    (schema,) = [v["schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]
    service = yaml.safe_load((deployed.DEPLOY / "ray-serve/rayservice.yaml").read_text())
    jsonschema.validate(service, schema["openAPIV3Schema"])
    for pod, container in deployed.containers(service):
        deployed.check_pod(pod, container)
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    print("ray-serve: 1 object valid against KubeRay's schema, its 2 pods against Kubernetes'")


def main():
    tools()
    import kubernetes_validate

    rendered = {"kubernetes": kustomized(deployed.DEPLOY / "kubernetes")}
    if os.environ.get("CHARTS") != "none":
        rendered |= {**dict(charts()), "llm-d": overlay()}
        ray_service()
    total = 0
    for name, objects in rendered.items():
        for one in objects:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
        connectors = ", ".join(sorted(deployed.check(objects)))
        total += len(objects)
        print(f"{name}: {len(objects)} objects valid; {connectors}")
    print(f"{total} objects valid against the schemas of Kubernetes {KUBERNETES}, arguments parsed")


if __name__ == "__main__":
    try:
        main()
    except UnavailableError as error:
        sys.exit(f"{error}, or CHARTS=none")
