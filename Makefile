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

.PHONY: help setup demo test test-unit test-kill test-s3 test-stack test-train test-gang test-demo test-browser test-export test-control-plane test-cluster test-node locks locks-check audit images image-operator image-train image-infer test-images lint format types bench clean cluster cluster-programs cluster-env cluster-down node node-images e2e chart lint-chart docs prometheus cluster-image walk pictures

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(UV):
	@python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: python3 is $$(python3 -V 2>&1 | cut -d' ' -f2); 3.11, 3.12 or 3.13 is needed" >&2; exit 2; }
	@python3 -m venv $(INSTALLER) >/dev/null 2>&1 || { rm -rf $(INSTALLER); python3 -m virtualenv -q $(INSTALLER) 2>/dev/null; } \
	  || { echo "error: python3 cannot make a virtual environment here; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@$(INSTALLER)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(STAMP): pyproject.toml uv.lock | $(UV)
	@$(UV) sync --frozen --quiet --extra cpu --extra operator --group dev --compile-bytecode --python "$$(command -v python3)"
	@touch $@

setup: $(STAMP) ## make .venv with everything the demo and the tests need (quick the second time)

demo: setup ## SFT, RL and the eight-file evaluation of a tiny model on this machine, about ten minutes
	@$(BIN)/egm run -f jobs/demo.yaml

test: setup lint types test-unit test-browser test-kill test-s3 test-stack ## what CI runs, but for test-control-plane and test-node

test-unit: setup ## pure and fast tests, seconds
	@$(BIN)/python -m pytest -q tests/unit

test-s3: setup ## storage and shipped results against a real S3 server on loopback, a minute or two
	@$(BIN)/python -m pytest -q tests/s3

test-kill: setup ## an evaluation killed twenty times, and on a full disk; about two minutes
	@$(BIN)/python -m pytest -q tests/evaluate_kill

test-stack: setup ## the real trainer and the real server on CPU, minutes
	@$(BIN)/python -m pytest -q tests/stack $(foreach t,ray_cluster $(TRAIN),--ignore=tests/stack/test_$(t).py)

TRAIN := same_outputs sft_shard internvl export
test-train: setup ## the same outputs by either back end, sharded SFT, InternVL, export; by name, a quarter of an hour
	@$(BIN)/python -m pytest -q $(TRAIN:%=tests/stack/test_%.py)

test-gang: setup ## RL over a Ray of two nodes, one of which is killed; root, minutes
	@$(BIN)/python -m pytest -q tests/stack/test_ray_cluster.py

test-demo: setup ## the demo killed at random moments ends in the same table; half an hour, not part of `make test`
	@$(BIN)/python -m pytest -q -s tests/demo

test-browser: setup ## the report in a real Chromium; skipped where there is none, but in CI
	@$(BIN)/python -m pytest -q tests/browser

# not in uv.lock: they would hold other packages back (trackio wants an older Pillow, inspect_ai an older fsspec)
EXPORTERS := inspect_ai==0.3.285 wandb==0.31.0 trackio==0.43.0 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
test-export: setup ## the exporters with the tools they write for, in an environment of their own; not part of `make test`
	@$(UV) venv --quiet --allow-existing .cache/export
	@VIRTUAL_ENV=.cache/export $(UV) pip install --quiet -e . $(EXPORTERS) hypothesis==6.170.15 pytest==9.2.0 pytest-asyncio==1.5.0 pytest-timeout==2.4.0
	@.cache/export/bin/python -m pytest -q tests/export

CONTROL_PLANE := walk crds chart_render chart_rbac runbooks operator_faults operator_killed operator_many operator_progress
test-control-plane: setup cluster-programs ## what users do and what breaks, on a real control plane; CI runs it; minutes, and half an hour more where its programs must be built
	@$(BIN)/python -m pytest -q $(CONTROL_PLANE:%=tests/cluster/test_%.py)

test-cluster: setup prometheus ## API server, CRDs, chart, dashboards: on the cluster of `make cluster`, or on EGM_KUBECONFIG's
	@$(BIN)/python -m pytest -q tests/cluster

chart: setup ## write what the chart holds of other sources: definitions, table of values, dashboards
	@$(BIN)/python hack/chart/generate.py

# in environments of their own: checkov pins half of PyPI
lint-chart: setup ## checkov and kube-score over the rendered chart; not part of `make test`
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

prometheus: ## Debian's Prometheus and promtool in .cache, unless they are on PATH
	@{ command -v prometheus && command -v promtool; } >/dev/null 2>&1 || ! command -v apt-get >/dev/null \
	  || $(MAKE) -s $(PROMETHEUS)/usr/bin/prometheus

PAGE := hack/dashboards/node_modules/.package-lock.json
$(PAGE): hack/dashboards/package-lock.json
	@command -v npm >/dev/null || { echo "error: pictures are drawn by Grafana's npm packages, and there is no npm; on Debian: apt-get install npm" >&2; exit 2; }
	@cd hack/dashboards && npm ci --silent
	@touch $@

pictures: setup prometheus $(PAGE) ## the dashboards as docs/pictures, of a fleet in the test cluster, ten minutes (FROM=http://...: of that Prometheus, MINUTES=60)
	@$(if $(FROM),$(BIN)/python hack/dashboards/pictures.py --prometheus $(FROM) --minutes $(or $(MINUTES),60),\
	  EGM_PICTURES=docs/pictures $(BIN)/python -m pytest -q -s tests/cluster/test_monitoring.py -k pictures)

cluster: ## a real Kubernetes 1.34 with simulated GPU nodes, without root (NODE=1: as `make node`; FAKE_NODES=n)
	@python3 hack/cluster/cluster.py up $(if $(FAKE_NODES),--fake-nodes $(FAKE_NODES)) $(if $(filter 1,$(NODE)),--node)

cluster-programs: ## build them, which `make cluster` does, too, when they are not there: half an hour, once a version
	@python3 hack/cluster/cluster.py build

node: ## the same with a real node: containerd, kubelet, kube-proxy, CoreDNS on this machine; root
	@python3 hack/cluster/cluster.py up --node $(if $(FAKE_NODES),--fake-nodes $(FAKE_NODES))

node-images: images ## the images of `make images`, on the real node
	@python3 hack/cluster/cluster.py load $(foreach i,operator train infer,localhost/egm-$(i):$(or $(TAG),dev))

# IMAGES=checkout: this checkout's environment instead of built images, for who is in a hurry
NODE_IMAGES = $(if $(filter checkout,$(IMAGES)),cluster-image,node-images)
test-node: setup node $(NODE_IMAGES) ## the part of e2e that CI runs: the chart's release, a gang of two pods that loses one; root, buildah, ten minutes
	@$(BIN)/python -m pytest -q -s tests/e2e/test_gang.py

e2e: setup node $(NODE_IMAGES) ## the pipeline as pods on a real node, by the chart and the built images, with disturbances; root, buildah, half an hour
	@$(BIN)/python -m pytest -q -s tests/e2e

cluster-env: ## its shell exports: eval "$$(make -s cluster-env)"
	@python3 hack/cluster/cluster.py env

cluster-image: setup ## this checkout's environment as the operator's images, on the real node of `make cluster NODE=1`
	@python3 hack/cluster/cluster.py image

walk: ## the way of a user in a clean clone: cluster, apply, suspend, resume, delete; minutes
	@hack/walk

cluster-down: ## stop it and remove what it left
	@python3 hack/cluster/cluster.py down

locks: | $(UV) ## write the images' lock files anew (UPGRADE=1: newest versions that fit)
	@UV=$(abspath $(UV)) python3 images/locks.py refresh $(if $(UPGRADE),--upgrade)

locks-check: | $(UV) ## resolve them anew and say what would change
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

test-images: setup ## the images built and run, their locks resolved and installed; root, buildah, half an hour; not part of `make test`
	@$(BIN)/python -m pytest -q -s tests/images

lint: setup ## ruff, as CI runs it
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup ## let ruff write what it can
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

types: setup ## mypy --strict over the package
	@$(BIN)/mypy

bench: setup ## benchmarks; JSON on stdout
	@for b in bench/*.py bench/evaluate; do $(BIN)/python $$b; done

clean: cluster-down ## remove what make and the runs made
	rm -rf .venv .cache runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
