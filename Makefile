# The commands of this repository. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tgb
KUBERNETES := $(or $(KUBEBUILDER_ASSETS),$(CACHE)/kubernetes/1.37.2)
CARGO_DENY := $(CACHE)/tools/cargo-deny-0.20.2
export PATH := $(KUBERNETES):$(CARGO_DENY)/bin:$(PATH)
export HELM := $(KUBERNETES)/helm
# Always the whole workspace: one feature set, so the AWS SDK is compiled once per mode.
WORKSPACE := --workspace --locked

.PHONY: help
help: ## lists the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.PHONY: test
test: fmt clippy deny generated unit chart ## everything that CI runs; installs what is missing
	@echo 'make test: all stages passed'

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

.PHONY: generate
generate: ## writes the generated files anew
	@python3 charts/readme.py

.PHONY: generated
generated: ## generated files are current
	@echo '== generated files'
	@python3 charts/readme.py --check
