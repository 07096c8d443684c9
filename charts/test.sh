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
has files 'caBundle: LS0tLS1CRUdJTiBD'
has certmanager 'cert-manager.io/inject-ca-from: tgb-system/tgb-targetgroupbinding-webhook'
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
docs = {p.stem: [d for d in yaml.safe_load_all(p.read_text()) if d] for p in tmp.glob("*.yaml")}
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
refuses vpcID --set clusterName=c,aws.vpcID=subnet-1

[ "$failed" = 0 ] && echo "chart: ok"
exit "$failed"
