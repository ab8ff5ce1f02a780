# `make demo` and `make test` do all their set-up themselves; only python3 (3.11 to 3.13), make and git are assumed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
INSTALLER  := .cache/installer
UV         := $(INSTALLER)/bin/uv
BIN        := .venv/bin
STAMP      := .venv/.egm-setup
export UV_PROJECT_ENVIRONMENT := .venv
export UV_PYTHON_DOWNLOADS := never
export PYTHONUNBUFFERED := 1
# without bytecode on disk every process compiles torch, verl and Ray anew: half a minute each
unexport PYTHONDONTWRITEBYTECODE

.PHONY: $(shell grep -oE '^[a-z][a-z0-9-]*( [a-z][a-z0-9-]*)*:' $(MAKEFILE_LIST) | tr -d ':')

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(UV):
	@python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: python3 is $$(python3 -V 2>&1 | cut -d' ' -f2); 3.11, 3.12 or 3.13 is needed" >&2; exit 2; }
	@python3 -m venv $(INSTALLER) >/dev/null 2>&1 || { rm -rf $(INSTALLER); python3 -m virtualenv -q $(INSTALLER) 2>/dev/null; } \
	  || { echo "error: python3 cannot make a virtual environment here; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing uv $(UV_VERSION) into $(INSTALLER)"
	@$(INSTALLER)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# Bytecode is compiled when a module is first imported: of 23,000 modules the demo imports a fifth.
$(STAMP): pyproject.toml uv.lock | $(UV)
	@echo "installing the locked packages into .venv (minutes on a slow network, seconds after that)"
	@$(UV) sync --frozen --extra cpu --extra operator --group dev --no-progress --python "$$(command -v python3)" 2>&1 | sed -u '/^ [+~-] /d'
	@$(BIN)/python -c 'import grounding' && touch $@

setup: $(STAMP) ## make .venv with all that the demo and the tests need

demo: setup ## SFT, RL and the eight-file evaluation of a tiny model on this machine, about ten minutes
	@$(BIN)/egm run -f jobs/demo.yaml

PYTEST := $(BIN)/python -m pytest -q
test: setup lint types ## all tests that need neither a cluster nor root, about twenty minutes
	@for part in unit browser evaluate_kill s3 stack; do \
	  echo "tests/$$part"; $(PYTEST) tests/$$part -m 'not train and not gang' || exit 1; done

test-unit: setup ## pure and fast tests, a minute or two
	@$(PYTEST) tests/unit

test-faults: setup ## N=200 random kills, disk errors and power cuts over the way of a job, each compared (S3=1: with a real S3 server)
	@$(BIN)/python tests/faults/trials.py -n $(or $(N),200) --seed $(or $(SEED),1) $(if $(S3),--s3)

REFERENCE := datasets==5.2.0 openai==3.57.0 pillow tqdm numpy
test-reference: setup # the reference's own scripts as oracles; EGM_REFERENCE=a checkout of github.com/zgq1879/EGM
	@test -f "$(EGM_REFERENCE)/verl/scripts/sglang_infer.py" || { echo "error: EGM_REFERENCE must name a checkout of github.com/zgq1879/EGM" >&2; exit 2; }
	@$(UV) venv --quiet --allow-existing .cache/reference
	@VIRTUAL_ENV=.cache/reference $(UV) pip install --quiet $(REFERENCE)
	@EGM_REFERENCE_PYTHON=$(abspath .cache/reference/bin/python) $(PYTEST) tests/reference

# not in uv.lock: they would hold other packages back (trackio wants an older Pillow, inspect_ai an older fsspec)
EXPORTERS := inspect_ai==0.3.285 wandb==0.31.0 trackio==0.43.0 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
test-export: setup # the exporters with the tools they write for, in an environment of their own
	@$(UV) venv --quiet --allow-existing .cache/export
	@VIRTUAL_ENV=.cache/export $(UV) pip install --quiet -e . $(EXPORTERS) hypothesis==6.170.15 pytest==9.2.0 pytest-asyncio==1.5.0 pytest-timeout==2.4.0
	@.cache/export/bin/python -m pytest -q tests/export

CONTROL_PLANE := walk crds judges drift chart_render chart_rbac runbooks operator_reasons operator_faults operator_killed operator_many operator_progress
test-control-plane: setup cluster-programs ## the operator and the chart on a real control plane; half an hour more if its programs must be built
	@$(BIN)/python -m pytest -q $(CONTROL_PLANE:%=tests/cluster/test_%.py)

test-cluster: setup prometheus ## all cluster tests, on the cluster of `make cluster` or on EGM_KUBECONFIG's
	@$(BIN)/python -m pytest -q tests/cluster

chart: setup ## write what the chart holds of other sources: definitions, table of values, dashboards
	@$(BIN)/python hack/chart/generate.py

# in environments of their own: checkov pins half of PyPI
lint-chart: setup ## checkov and kube-score over the rendered chart
	@$(UV) venv --quiet --allow-existing .cache/checkov
	@VIRTUAL_ENV=.cache/checkov $(UV) pip install --quiet checkov==3.3.30
	@$(BIN)/python hack/chart/lint.py

docs: setup ## the documentation as a site in .cache/site
	@$(BIN)/python hack/docs/reference.py
	@$(UV) venv --quiet --allow-existing .cache/mkdocs
	@VIRTUAL_ENV=.cache/mkdocs $(UV) pip install --quiet mkdocs==1.6.1 mkdocs-material==9.8.1
	@NO_MKDOCS_2_WARNING=1 .cache/mkdocs/bin/mkdocs build --quiet

PROMETHEUS := .cache/prometheus
$(PROMETHEUS)/usr/bin/prometheus:
	@mkdir -p $(PROMETHEUS)
	@cd $(PROMETHEUS) && apt-get download -qq prometheus && for f in prometheus_*.deb; do dpkg -x "$$f" . && rm "$$f"; done

prometheus: # Debian's Prometheus and promtool in .cache, unless they are on PATH
	@{ command -v prometheus && command -v promtool; } >/dev/null 2>&1 || ! command -v apt-get >/dev/null \
	  || $(MAKE) -s $(PROMETHEUS)/usr/bin/prometheus

cluster: ## a real Kubernetes 1.34 with simulated GPU nodes, without root (NODE=1: as `make node`; FAKE_NODES=n)
	@python3 hack/cluster/cluster.py up $(if $(FAKE_NODES),--fake-nodes $(FAKE_NODES)) $(if $(filter 1,$(NODE)),--node)

cluster-programs: # build them, which `make cluster` does, too, when they are not there: half an hour, once a version
	@python3 hack/cluster/cluster.py build

node: ## the same with a real node: containerd, kubelet, kube-proxy, CoreDNS on this machine; root
	@python3 hack/cluster/cluster.py up --node $(if $(FAKE_NODES),--fake-nodes $(FAKE_NODES))

node-images: images # the images of `make images`, on the real node
	@python3 hack/cluster/cluster.py load $(foreach i,operator train infer,localhost/egm-$(i):$(or $(TAG),dev))

# IMAGES=checkout: this checkout's environment instead of built images, for who is in a hurry
NODE_IMAGES = $(if $(filter checkout,$(IMAGES)),cluster-image,node-images)
test-node: setup node $(NODE_IMAGES) ## images, the chart's release, two training pods of which one is lost; root, buildah, ten minutes
	@$(BIN)/python -m pytest -q -s tests/e2e/test_gang.py

e2e: setup node $(NODE_IMAGES) ## the whole pipeline as pods on a real node, with disturbances; root, buildah, half an hour
	@$(BIN)/python -m pytest -q -s tests/e2e

cluster-env: # its shell exports: eval "$$(make -s cluster-env)"
	@python3 hack/cluster/cluster.py env

cluster-image: setup # this checkout's environment as the operator's images, on the real node of `make cluster NODE=1`
	@python3 hack/cluster/cluster.py image

walk: # the way of a user in a clean clone: cluster, apply, suspend, resume, delete; minutes
	@hack/walk

cluster-down: ## stop it and remove what it left
	@python3 hack/cluster/cluster.py down

locks: | $(UV) ## write the images' lock files anew (UPGRADE=1: newest versions that fit)
	@UV=$(abspath $(UV)) python3 images/locks.py refresh $(if $(UPGRADE),--upgrade)

locks-check: | $(UV) # resolve them anew and say what would change
	@UV=$(abspath $(UV)) python3 images/locks.py check

LOCKS ?= $(wildcard images/*/requirements*.txt)
# in an environment of its own, as checkov
audit: | $(UV) ## known vulnerabilities in what the images' locks hold, by pip-audit; asks osv.dev (SERVICE=pypi: PyPI)
	@$(UV) venv --quiet --allow-existing .cache/audit
	@VIRTUAL_ENV=.cache/audit $(UV) pip install --quiet pip-audit==2.10.1
	@bad=0; for lock in $(LOCKS); do echo "$$lock"; \
	  .cache/audit/bin/pip-audit --progress-spinner off --disable-pip --require-hashes -s $(or $(SERVICE),osv) -r $$lock || bad=1; done; exit $$bad

images: image-operator image-train image-infer ## build all images by buildah, root (VARIANT=cpu or gpu, ENGINE=sglang or vllm, TAG=dev, BASE=...)

image-operator image-train image-infer:
	@images/build.sh $(@:image-%=%)

test-images: setup # the images built and run, their locks resolved and installed; root, buildah, half an hour
	@$(BIN)/python -m pytest -q -s tests/images

lint: setup ## ruff and the rules of imports, as CI runs them
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache

format: setup ## let ruff write what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

types: setup ## mypy --strict over the package
	@$(BIN)/mypy

bench: setup ## benchmarks that run on any machine; JSON on stdout
	@for b in bench/*.py bench/evaluate; do $(BIN)/python $$b; done

clean: cluster-down ## remove what make and the runs made
	rm -rf .venv .cache runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
