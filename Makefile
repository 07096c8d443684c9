# The commands of this repository. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tgb
KUBERNETES := $(CACHE)/kubernetes/1.37.2
CARGO_DENY := $(CACHE)/tools/cargo-deny-0.20.2
export PATH := $(KUBERNETES):$(CARGO_DENY)/bin:$(PATH)
export HELM := $(KUBERNETES)/helm
# Always the whole workspace: one feature set, so the AWS SDK is compiled once per mode.
WORKSPACE := --workspace --locked

.PHONY: help
help: ## lists the commands
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.PHONY: demo
demo: ## the product's main job on a real control plane; ARGS=--once ends by itself
	@echo '== building (the AWS SDK takes minutes the first time)'
	@cargo build $(WORKSPACE) --bins
	@target/debug/demo $(ARGS)

.PHONY: test
test: ## everything that CI runs; installs what is missing
	@for stage in fmt deny clippy unit generated chart e2e; do \
		begun=$$SECONDS; $(MAKE) --no-print-directory $$stage; echo "   ($$stage: $$((SECONDS - begun)) s)"; \
	done; echo "== all stages passed after $$SECONDS s"

.PHONY: fmt
fmt: ## formatting is rustfmt's
	@echo '== fmt'
	@cargo fmt --all --check

.PHONY: clippy
clippy: ## warnings are errors
	@echo '== clippy (the AWS SDK takes minutes the first time)'
	@cargo clippy $(WORKSPACE) --all-targets -- -D warnings

$(CARGO_DENY)/bin/cargo-deny:
	@echo '== installing cargo-deny 0.20.2 (about 3 minutes, once)'
	@cargo install --quiet --locked cargo-deny --version 0.20.2 --root $(CARGO_DENY)

.PHONY: deny
deny: $(CARGO_DENY)/bin/cargo-deny ## licences, sources, banned crates
	@echo '== cargo deny'
	@cargo deny --log-level error check bans licenses sources

.PHONY: control-plane
control-plane: ## etcd, Kubernetes, kwok and helm from their Go modules (about 16 minutes, once)
	@e2e/kubernetes/build.sh $(KUBERNETES)

.PHONY: unit
unit: ## unit and property tests
	@echo '== unit and property tests'
	@cargo test $(WORKSPACE) --lib --bins

.PHONY: chart
chart: control-plane ## the chart: lint, template twice, schema
	@echo '== chart'
	@charts/test.sh

.PHONY: e2e
e2e: control-plane ## scenarios on a real control plane
	@echo '== scenarios on a real control plane'
	@cargo build $(WORKSPACE) --bins
	@rm -rf target/awsim
	@cargo test $(WORKSPACE) --test '*' --no-run --message-format=json >target/suites.json
	@TGB_RECORD=$(CURDIR)/target/awsim e2e/suites.py <target/suites.json
	@$(CACHE)/venv/bin/python e2e/awsim/tests/fidelity.py --replay target/awsim/*.jsonl

.PHONY: bench
bench: control-plane ## figures of the release binaries, also in target/bench.json; FULL=1 with 5,000 bindings, ONLY=webhook|controller|scale|rolling|nodes|networking, PEER=PATH of an AWS Load Balancer Controller beside ours
	@echo '== building for release (the AWS SDK takes about ten minutes and 8 GB the first time)'
	@cargo build --release $(WORKSPACE) --bins
	@FULL=$(FULL) ONLY=$(ONLY) PEER="$(PEER)" target/release/bench

.PHONY: soak
soak: control-plane ## an hour of mixed change with faults; MINUTES=N, SEED=N
	@cargo build --release $(WORKSPACE) --bins
	@MINUTES=$(MINUTES) SEED=$(SEED) target/release/bench soak

.PHONY: fuzz
fuzz: ## changed inputs for every decoder, ten minutes each; TIME=seconds
	@TGB_FUZZ_SECONDS=$(or $(TIME),600) cargo test $(WORKSPACE) --lib --bins -- fuzz_ --nocapture

.PHONY: prove
prove: control-plane ## the laws of conversion over 1,000,000 objects each (about 10 minutes), then security groups, crashes at every call, random faults, and storage switched under 2,000 bindings; CASES=N for another number
	@TGB_PROVE_CASES=$(or $(CASES),1000000) cargo test --locked --release -p tgb-api --lib convert
	@cargo build $(WORKSPACE) --bins
	@TGB_PROVE_CASES=3000 cargo test $(WORKSPACE) --bin tgb-controller -- group::tests::model
	@TGB_PROVE_CASES=1 cargo test $(WORKSPACE) --test crash
	@TGB_PROVE_OBJECTS=2000 cargo test $(WORKSPACE) --test legacy

.PHONY: generate
generate: ## writes the generated files anew
	@cargo build $(WORKSPACE) --bin tgb-webhook
	@target/debug/tgb-webhook crd >charts/targetgroupbinding/files/crd.yaml
	@target/debug/tgb-webhook rules >docs/rules.md
	@python3 charts/readme.py

.PHONY: generated
generated: ## generated files are current
	@echo '== generated files'
	@cargo build $(WORKSPACE) --bins
	@diff -u charts/targetgroupbinding/files/crd.yaml <(target/debug/tgb-webhook crd) || { echo 'the CRD of the chart is not current; run: make generate' >&2; exit 1; }
	@diff -u docs/rules.md <(target/debug/tgb-webhook rules) || { echo 'docs/rules.md is not current; run: make generate' >&2; exit 1; }
	@python3 charts/readme.py --check
