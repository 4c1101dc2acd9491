# Everything a developer or CI does here, one target each. `make` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Two builds: everything without a tensor framework, and the worker with its kernels. One build of the whole
# workspace would unify their features and put a GPU backend's wishes under the coordinator;
# one build a crate would compile the shared dependencies five times.
PLAIN := -p cairn-stack -p cairn-proto -p cairn-coordinator -p cairn-cli -p cairn-tests
WORKER := -p cairn-worker -p cairn-kernels
CARGO := cargo
CARGO_FLAGS := --locked
TARGET := $(or $(CARGO_TARGET_DIR),target)
SCRIPTS := $(wildcard scripts/*.sh) .ci/run

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: ## build the three programs into target/debug
	$(CARGO) build $(CARGO_FLAGS) $(PLAIN)
	$(CARGO) build $(CARGO_FLAGS) $(WORKER)

.PHONY: demo
demo: build ## a coordinator, an evaluator, volunteers and a cheat on this machine: two real rounds
	$(TARGET)/debug/cairn demo

.PHONY: study
study: build ## what stacking recovers of central training, against FedIT and FedEx: half an hour of two cores
	$(TARGET)/debug/cairn-studies study $(STUDY)

.PHONY: attacks
attacks: build ## saboteurs against the real pipeline: caught where, at what cost: an hour of two cores
	$(TARGET)/debug/cairn-studies attacks $(ATTACKS)

# Longer or shorter: make replicas REPLICAS="--rounds 10"; over a bucket: REPLICAS="--bucket".
.PHONY: replicas
replicas: build ## three coordinators over one PostgreSQL under kill -9, 10,000 submissions: half an hour of two cores
	scripts/postgres.sh $(TARGET)/debug/cairn-replicas $(REPLICAS)

# Every session of the herd is an open file, on both sides.
.PHONY: chaos
chaos: build ## faults of every kind on the real programs, and what is survived: ten minutes
	ulimit -n "$$(ulimit -Hn)" || true; $(TARGET)/debug/cairn-chaos $(CHAOS)

# Shorter, or on other records: make bench-train BENCH="--case full --data gsm8k-train.jsonl".
.PHONY: bench-train
bench-train: ## training and evaluation beside transformers and PEFT, taking turns: half an hour (installs about 7 GB)
	mkdir -p $(TARGET)/bench
	$(CARGO) build $(CARGO_FLAGS) $(WORKER) --examples
	cp $(TARGET)/debug/examples/bench_train $(TARGET)/bench/flex
	environment=$$(scripts/libtorch.sh); eval "$$environment"; \
	$(CARGO) build $(CARGO_FLAGS) -p cairn-worker --no-default-features --features tch --examples; \
	cp $(TARGET)/debug/examples/bench_train $(TARGET)/bench/tch; \
	"$$(scripts/reference-venv.sh)/bin/python" scripts/bench_train.py \
	  --ours flex=$(TARGET)/bench/flex --ours tch=$(TARGET)/bench/tch $(BENCH)

# One shape: make bench-memory MEMORY="--case small". The last, 7b, holds 5 GB and takes ten minutes.
.PHONY: bench-memory
bench-memory: ## what a training step holds, by shape and format, beside what is expected: half an hour
	$(CARGO) build $(CARGO_FLAGS) -p cairn-worker --example bench_memory
	python3 scripts/bench_memory.py --program $(TARGET)/debug/examples/bench_memory $(MEMORY)

.PHONY: test
test: test-crates test-tch fuzz ## every test of every crate, the worker's on LibTorch, each fuzz target for a while

# The programs come first: the whole-system tests start them.
.PHONY: test-crates
test-crates: build ## every test of every crate, on the default device
	scripts/postgres.sh $(MAKE) --no-print-directory each-crate

.PHONY: each-crate
each-crate:
	failed=; for crates in "$(PLAIN)" "$(WORKER)"; do \
	  $(CARGO) test $(CARGO_FLAGS) $$crates --no-fail-fast || failed+=" $$crates"; \
	done; \
	if [ -n "$$failed" ]; then echo "tests failed in:$$failed"; exit 1; fi

.PHONY: test-tch
test-tch: ## the worker's tests on LibTorch, with our kernels and as on a card (installs it outside the checkout)
	environment=$$(scripts/libtorch.sh); eval "$$environment"; export CAIRN_TEST_DEVICE=tch; \
	libtorch() { $(CARGO) test $(CARGO_FLAGS) -p cairn-worker --no-default-features --features tch --no-fail-fast "$$@"; }; \
	libtorch; \
	CAIRN_TEST_KERNELS=burn libtorch --lib --test parity --test training --test packing --test objectives

# The code of the accelerators without one: wgpu on a Vulkan driver that computes on the CPU. Not part of
# `make test` or CI: wgpu and CubeCL take half an hour of two cores to build, and the driver is installed
# as root. Run it when you touch worker/src/model/ops.rs or worker/src/device. On your own card:
# make vulkan GRAPHICS=vulkan VK_DRIVER_FILES=/usr/share/vulkan/icd.d/radeon_icd.x86_64.json.
# (CubeCL's own compiler, which `vulkan` uses, crashes the driver of the CPU: docs/results/devices.md.)
GRAPHICS := wgpu
.PHONY: vulkan
vulkan: ## the worker on a software Vulkan driver: canary, parity, a training (installs the driver on Debian, as root)
	environment=$$(scripts/vulkan.sh); eval "$$environment"; \
	graphics() { $(CARGO) "$$1" $(CARGO_FLAGS) -p cairn-worker --no-default-features --features $(GRAPHICS) "$${@:2}"; }; \
	graphics build; $(TARGET)/debug/cairn-worker devices; \
	export CAIRN_TEST_DEVICE=$(GRAPHICS); \
	graphics test --lib canary -- --nocapture; \
	graphics test --test parity --test training --test packing; \
	graphics test --test devices -- --test-threads 1; \
	graphics test --test command the_device_of_choice

# Longer: make fuzz SECONDS=600; one target: scripts/fuzz.sh 600 adapter.
SECONDS := 10
.PHONY: fuzz
fuzz: ## try made-up files on every parser, SECONDS=10 each
	scripts/fuzz.sh $(SECONDS)

.PHONY: lint
lint: lint-format lint-deny lint-typos lint-proto lint-shell lint-clippy lint-docs ## everything that reads the code without running it

.PHONY: lint-format
lint-format: ## rustfmt
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check

.PHONY: lint-clippy
lint-clippy: ## clippy on every crate, warnings are errors
	$(CARGO) clippy $(CARGO_FLAGS) --quiet $(PLAIN) --all-targets -- -D warnings
	$(CARGO) clippy $(CARGO_FLAGS) --quiet $(WORKER) --all-targets -- -D warnings
	$(CARGO) clippy $(CARGO_FLAGS) --quiet --manifest-path fuzz/Cargo.toml --target-dir $(TARGET)/fuzz/build -- -D warnings

.PHONY: lint-docs
lint-docs: ## links in the crates' documentation
	$(CARGO) doc $(CARGO_FLAGS) --quiet --no-deps $(PLAIN)
	$(CARGO) doc $(CARGO_FLAGS) --quiet --no-deps $(WORKER)

# Advisories need a database that is fetched over git: `make lint-advisories`, where that is reachable.
.PHONY: lint-deny
lint-deny: ## licences, sources and bans of every dependency
	PATH=$$(scripts/tools.sh):$$PATH; cargo-deny --log-level error check licenses bans sources

.PHONY: lint-advisories
lint-advisories: ## known vulnerabilities in dependencies (needs the network; not part of lint)
	PATH=$$(scripts/tools.sh):$$PATH; cargo-deny check advisories

.PHONY: lint-typos
lint-typos: ## spelling
	PATH=$$(scripts/tools.sh):$$PATH; typos

.PHONY: lint-proto
lint-proto: ## the wire contract
	PATH=$$(scripts/tools.sh):$$PATH; buf lint proto

.PHONY: lint-shell
lint-shell: ## shell scripts
	PATH=$$(scripts/tools.sh):$$PATH; shellcheck $(SCRIPTS)

.PHONY: fmt
fmt: ## format every crate
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml

.PHONY: reference
reference: ## regenerate the reference values with transformers and PEFT (installs about 7 GB; not in CI)
	scripts/reference.sh

.PHONY: interop
interop: build ## open what we publish with transformers and PEFT and compare losses (not in CI)
	scripts/interop.sh
