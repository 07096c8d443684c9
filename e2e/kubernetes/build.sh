#!/usr/bin/env bash
# Builds the programs of the test control plane from the Go modules pinned beside this file, once, into the
# directory named by the first argument. What is there already is left alone; each program appears only when
# it is complete, so an interrupted build can simply be started again.
#
#   build.sh DIR      build everything that DIR lacks
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:?usage: build.sh DIR}
kubernetes=1.37.2

# program  module  package  minutes on two cores
programs=(
    "etcd etcd go.etcd.io/etcd/server/v3 1"
    "kubectl kubernetes k8s.io/kubernetes/cmd/kubectl 1"
    "kwok kwok sigs.k8s.io/kwok/cmd/kwok 2"
    "helm helm helm.sh/helm/v4/cmd/helm 3"
    "kube-apiserver kubernetes k8s.io/kubernetes/cmd/kube-apiserver 8"
    "kube-controller-manager kubernetes k8s.io/kubernetes/cmd/kube-controller-manager 3"
    "kube-scheduler kubernetes k8s.io/kubernetes/cmd/kube-scheduler 1"
)

missing=()
for program in "${programs[@]}"; do
    read -r name _ <<<"$program"
    [ -x "$out/$name" ] || missing+=("$program")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

if ! command -v go >/dev/null; then
    echo "control plane: Go 1.26 or newer is needed to build Kubernetes once; install it, or set KUBEBUILDER_ASSETS to a directory with etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubectl, kwok and helm" >&2
    exit 1
fi

mkdir -p "$out"
exec 9>"$out/.lock"
flock 9

flags="-s -w -X k8s.io/component-base/version.gitVersion=v$kubernetes"
flags+=" -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37"
count=0
for program in "${missing[@]}"; do
    read -r name module package minutes <<<"$program"
    count=$((count + 1))
    [ -x "$out/$name" ] && continue
    echo "control plane: building $name ($count of ${#missing[@]}, about $minutes min, once)" >&2
    started=$SECONDS
    log=$out/.$name.log
    if ! (cd "$here/$module" && CGO_ENABLED=0 go build -mod=readonly -trimpath -ldflags "$flags" -o "$out/.$name.new" "$package") >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        echo "control plane: building $name failed (the whole output: $log); check that the Go module proxy can be reached, then start again" >&2
        exit 1
    fi
    mv "$out/.$name.new" "$out/$name"
    rm -f "$log"
    echo "control plane: $name ready after $((SECONDS - started)) s" >&2
done
