#!/bin/sh
# Checks of the chart that need no cluster: HELM=path charts/test.sh. What the API server thinks of it is tested in e2e.
set -eu
cd "$(dirname "$0")"
helm=${HELM:-helm}
command -v "$helm" >/dev/null || { echo "charts/test.sh: no helm; HELM=path charts/test.sh" >&2; exit 1; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

fail() { echo "FAIL $*" >&2; failed=1; }
render() { "$helm" template tgb targetgroupbinding --namespace tgb-system "$@"; }

# renders NAME ARGS…: the values render, twice the same.
renders() {
  name=$1; shift
  if ! render "$@" >"$tmp/$name.yaml" 2>"$tmp/err"; then fail "$name: $(cat "$tmp/err")"; return; fi
  render "$@" >"$tmp/again.yaml"
  cmp -s "$tmp/$name.yaml" "$tmp/again.yaml" || fail "$name: two renderings differ"
}
# renders_file NAME ARGS…: the same with a values file from standard input. Its numbers are floats and its `off` is a boolean,
# which `--set` knows nothing of.
renders_file() {
  name=$1; shift
  cat >"$tmp/$name.values"
  renders "$name" --values "$tmp/$name.values" "$@"
}
# refuses_file WORD: values from standard input are refused with a message that has the word.
refuses_file() {
  cat >"$tmp/refused.values"
  refuses "$1" --values "$tmp/refused.values"
}
# refuses WORD ARGS…: the values are refused with a message that has the word.
refuses() {
  word=$1; shift
  if render "$@" >"$tmp/out" 2>&1; then fail "accepted: $*"; return; fi
  grep -q -- "$word" "$tmp/out" || fail "refused without naming $word: $* ($(cat "$tmp/out"))"
}
# has / hasnt NAME TEXT
has() { grep -qF -- "$2" "$tmp/$1.yaml" || fail "$1: no $2"; }
hasnt() { if grep -qF -- "$2" "$tmp/$1.yaml"; then fail "$1: $2 must not be there"; fi; }

./readme.py --check || failed=1
"$helm" lint --quiet --strict targetgroupbinding --set clusterName=c || fail "helm lint"

renders default --set clusterName=c
renders everything --set clusterName=c,networkPolicy.enabled=true,metrics.podMonitor.enabled=true \
  --set metrics.serviceMonitor.enabled=true,metrics.prometheusRule.enabled=true,metrics.dashboard.enabled=true \
  --set webhook.rules.TGB206=warn,webhook.rules.TGB306=off,webhook.hostNetwork=true,logging.otlpEndpoint=http://collector:4318,aws.region=eu-central-1 \
  --set 'sharedTargets.namespaces={shop,blog},watchNamespaces={shop,blog},ruleOwner=a' \
  --set 'policy.assumeRoleAllow={arn:aws:iam::*:role/tgb-*},policy.namespaceBindingTag=tgb-namespaces' \
  --set controller.maxTargetsPerTargetGroup=1000000,controller.observe=true,controller.swapGrace=5m,controller.endpointsFailOpen=false \
  --set controller.lease.duration=30s,controller.lease.renewDeadline=20s,controller.lease.retryPeriod=5s
renders outside --set clusterName=c,webhook.url=https://192.0.2.1:9443,controller.replicas=0
renders certmanager --set clusterName=c,webhook.tls.mode=cert-manager
printf -- '-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n' >"$tmp/ca.pem"
renders files --set clusterName=c,webhook.tls.mode=files,webhook.tls.secretName=own \
  --set-file webhook.tls.caBundle="$tmp/ca.pem"
renders beside --set controller.enabled=false,crd.storageVersion=v1beta1
renders shared --set clusterName=c,'sharedTargets.namespaces={*}'

renders uninstall --set clusterName=c,'watchNamespaces={shop}',ruleOwner=a,controller.manageLBCBindings=true,uninstall.force=true \
  --api-versions apiregistration.k8s.io/v1/APIService
renders second --set clusterName=c,crd.enabled=false,'watchNamespaces={shop}',ruleOwner=a \
  --api-versions apiregistration.k8s.io/v1/APIService
renders hosts --set clusterName=c,webhook.hostNetwork=true,controller.hostNetwork=true,controller.httpPort=8081
renders_file file <<'YAML'
clusterName: c
commonLabels: {team: 1234, app.kubernetes.io/name: theirs, helm.sh/chart: theirs, cost: 1e6, beta: true}
logging: {level: off}
webhook:
  rules: {TGB306: off, TGB206: warn, TGB501: off}
  terminationGracePeriodSeconds: 1000000
  podLabels: {cost: 5678, app.kubernetes.io/component: theirs}
  podAnnotations: {since: 2026, on: true}
  nodeSelector: {pool: 7}
  serviceAccount: {annotations: {account: 123456789012}}
  service: {annotations: {cost: 1000000}}
  extraEnv: [{name: A, value: 1000000}, {name: B, value: true}, {name: C, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
controller:
  maxTargetsPerTargetGroup: 1000000
  pollRate: 0.5
  podAnnotations: {since: 2026}
crd: {annotations: {cost: 12}}
metrics: {podMonitor: {enabled: true, labels: {release: 5}}}
YAML
renders_file rates <<'YAML'
clusterName: c
controller: {pollRate: 4, maxTargetsPerTargetGroup: 12345678}
YAML
# A chart above hands down what it has for it, `enabled` among it.
renders_file part <<'YAML'
enabled: true
global: {imageRegistry: x}
clusterName: c
YAML
long=$(printf 'a%.0s' $(seq 70))
renders long --set "clusterName=c,nameOverride=$long"
for release in my.api 1st a.b.c- my.targetgroupbinding; do
  for values in clusterName=c "clusterName=c,nameOverride=My_Name" "clusterName=c,fullnameOverride=9.Full_Name."; do
    "$helm" template "${release%-}" targetgroupbinding --namespace tgb-system --set "$values" >>"$tmp/names.out" ||
      fail "release $release with $values"
  done
done
sed -n 's/^  name: //p' "$tmp/names.out" | tr -d '"' | sort -u | grep -vxE '[a-z]([-a-z0-9]{0,61}[a-z0-9])?|targetgroupbindings.elbv2.k8s.aws' &&
  fail "names that Kubernetes does not take"

for file in "$tmp"/*.yaml; do
  name=$(basename "$file" .yaml)
  if grep -n ' $' "$file" >/dev/null; then fail "$name: blanks at the end of a line"; fi
done
for path in mutate-elbv2-k8s-aws-targetgroupbinding validate-elbv2-k8s-aws-targetgroupbinding validate-v1-service \
  mutate-v1-pod convert; do
  has default "path: /$path"
  has outside "https://192.0.2.1:9443/$path"
done
has default 'helm.sh/resource-policy: keep'
has default 'strategy: Webhook'
hasnt default caBundle          # an upgrade must not wipe what the webhook writes
hasnt outside caBundle
renders outsidefiles --set clusterName=c,webhook.url=https://192.0.2.1:9443,webhook.tls.mode=files,webhook.tls.secretName=own \
  --set-file webhook.tls.caBundle="$tmp/ca.pem"
has outsidefiles 'caBundle: LS0tLS1CRUdJTiBD'
hasnt files caBundle            # nor do Helm and cert-manager replace it under the pods that still serve the other one
hasnt certmanager caBundle
hasnt certmanager inject-ca-from
has files '--tls-ca-file=/authority/ca.crt'
has certmanager '--tls-ca-file=/tls/ca.crt'
hasnt default '--tls-ca-file'
for name in default everything certmanager files beside shared; do
  hasnt "$name" 'helm.sh/hook'  # applied by something else than Helm, a hook is an object like any other
done
has uninstall '- prepare-uninstall'
has uninstall '--release=tgb-system/tgb'
has uninstall '--watch-namespaces=shop'
has uninstall '--manage-lbc-bindings'
has uninstall '- --force'
hasnt uninstall '--no-controller'
has second 'helm.sh/hook: test'
hasnt second prepare-uninstall
hasnt second customresourcedefinitions
hasnt second targetgroupbindings.elbv2.k8s.aws
has second '--crd-name='
has default '--crd-name=targetgroupbindings.elbv2.k8s.aws'
has default '--shared-targets-namespaces='
has everything '--shared-targets-namespaces=shop,blog'
has shared '--shared-targets-namespaces=*'
hasnt beside '--shared-targets-namespaces'
has default 'rollingUpdate: {maxUnavailable: 0, maxSurge: 1}'
has hosts 'rollingUpdate: {maxUnavailable: 1, maxSurge: 0}'
has file '--rules=TGB206=warn,TGB306=off,TGB501=off'
has file '--log-level=off'
has file '--max-targets-per-target-group=1000000'
has file '--poll-rate=0.5'
has file 'terminationGracePeriodSeconds: 1000000'
has rates '--poll-rate=4"'
has rates '--max-targets-per-target-group=12345678'
hasnt outside 'targetPort: https'
has everything '--rules=TGB206=warn,TGB306=off'
has everything '--watch-namespaces=shop,blog'
has everything '--otlp-endpoint=http://collector:4318'
has everything '--max-targets-per-target-group=1000000'
has everything 'ClusterFirstWithHostNet'
hasnt beside '--cluster-name'
hasnt default '--resync'
hasnt default '--endpoints-fail-open'
has everything '--endpoints-fail-open=false'
has everything '--lease-renew-deadline=20s'

python3 - "$tmp" targetgroupbinding/files <<'PY' || failed=1
"""What a text search can't see: structure of the rendered objects. Needs PyYAML; says so where it is missing."""
import json, pathlib, sys
try:
    import yaml
except ImportError:
    print("charts/test.sh: no PyYAML, the structural checks are skipped", file=sys.stderr)
    sys.exit(0)
tmp, files = map(pathlib.Path, sys.argv[1:])


class Once(yaml.SafeLoader):
    """A key that is there twice is an error, as the API server has it."""


def once(loader, node, deep=False):
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in {key for key in keys if keys.count(key) > 1}:
        print(f"FAIL a key is rendered twice: {key}{node.start_mark}", file=sys.stderr)
        sys.exit(1)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, once)
docs = {p.stem: [d for d in yaml.load_all(p.read_text(), Once) if d] for p in tmp.glob("*.yaml")}
source = yaml.safe_load((files / "crd.yaml").read_text())
json.loads((files / "dashboard.json").read_text())
bad = []
for name, objects in docs.items():
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    if len(keys) != len(set(keys)):
        bad.append(f"{name}: an object is rendered twice")
    for o in objects:
        kind = o["kind"]
        if kind == "CustomResourceDefinition":
            stored = [v["name"] for v in o["spec"]["versions"] if v["storage"]]
            if stored != ["v1beta1" if name == "beside" else "v1"]:
                bad.append(f"{name}: stored version {stored}")
            if o["spec"]["conversion"]["strategy"] != "Webhook":
                bad.append(f"{name}: the CRD has no converter")
            for ours, theirs in zip(o["spec"]["versions"], source["spec"]["versions"], strict=True):
                if {**ours, "storage": 0} != {**theirs, "storage": 0}:
                    bad.append(f"{name}: version {theirs['name']} differs from files/crd.yaml")
        if kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
            for w in o["webhooks"]:
                for field in ("failurePolicy", "matchPolicy", "sideEffects", "timeoutSeconds", "namespaceSelector",
                              "objectSelector", "matchConditions", "admissionReviewVersions"):
                    if field not in w:
                        bad.append(f"{name}: {w['name']} has no {field}")
        texts = [o["metadata"].get("labels"), o["metadata"].get("annotations")]
        if kind == "Deployment":
            inner = o["spec"]["template"]
            texts += [inner["metadata"].get("labels"), inner["metadata"].get("annotations"), inner["spec"].get("nodeSelector")]
            texts += [{e["name"]: e["value"]} for c in inner["spec"]["containers"] for e in c.get("env", []) if "value" in e]
            selector = o["spec"]["selector"]["matchLabels"]
            if selector.items() - inner["metadata"]["labels"].items():
                bad.append(f"{name}: {o['metadata']['name']} does not select its own pods")
        for key, value in (item for each in texts if each for item in each.items()):
            if not isinstance(value, str) or "e+" in value:
                bad.append(f"{name}: {kind} {o['metadata']['name']}: {key} is {value!r}, which is no text")
        for key in ("app.kubernetes.io/name", "app.kubernetes.io/instance", "helm.sh/chart"):
            if len(o["metadata"].get("labels", {}).get(key, "")) > 63:
                bad.append(f"{name}: {kind} {o['metadata']['name']}: the label {key} is too long")
        if kind in ("ClusterRole", "Role"):
            for rule in o["rules"]:
                if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]:
                    bad.append(f"{name}: a wildcard in {o['metadata']['name']}")
        template = o.get("spec", {}).get("template", {}).get("spec") if kind in ("Deployment", "Job") else None
        if template:
            pod = template["securityContext"]
            for c in template["containers"]:
                own = c["securityContext"]
                if not (pod["runAsNonRoot"] and pod["seccompProfile"]["type"] == "RuntimeDefault"
                        and own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
                        and own["readOnlyRootFilesystem"]):
                    bad.append(f"{name}: {o['metadata']['name']} does not pass `restricted`")
for line in bad:
    print("FAIL", line, file=sys.stderr)
sys.exit(bool(bad))
PY

refuses clusterName --set controller.enabled=true
refuses storageVersion --set clusterName=c,crd.storageVersion=v2
refuses colour --set clusterName=c,webhook.colour=red
refuses url --set clusterName=c,webhook.url=http://192.0.2.1
refuses mode --set clusterName=c,webhook.tls.mode=none
refuses secretName --set clusterName=c,webhook.tls.mode=files
refuses webhook.enabled --set clusterName=c,webhook.enabled=false
refuses ruleOwner --set clusterName=c,'watchNamespaces={a}'
refuses TGB --set clusterName=c,webhook.rules.TGB20=deny
refuses rules --set clusterName=c,webhook.rules.TGB206=perhaps
refuses TGB501 --set clusterName=c,webhook.rules.TGB501=deny
refuses port --set clusterName=c,webhook.port=70000
refuses swapGrace --set clusterName=c,controller.swapGrace=soon
refuses controller.httpPort --set clusterName=c,webhook.hostNetwork=true,controller.hostNetwork=true
refuses webhook.httpPort --set clusterName=c,webhook.httpPort=9443
refuses_file TGB306 <<'YAML'
clusterName: c
webhook: {rules: {TGB306: on}}
YAML
refuses_file commonLabels <<'YAML'
clusterName: c
commonLabels: {team: {name: a}}
YAML
refuses vpcID --set clusterName=c,aws.vpcID=subnet-1

[ "$failed" = 0 ] && echo "chart: ok"
exit "$failed"
