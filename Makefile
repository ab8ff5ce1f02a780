# `make demo` and `make test` do all their set-up; they only need python3 (3.11 to 3.13), make and git.
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
# uv trusts only its own list of certificates; networks that open TLS connections add theirs to the system's
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem),)
export UV_SYSTEM_CERTS ?= true
endif
# without bytecode on the disk, every process compiles torch, verl and Ray again, which takes half a minute
unexport PYTHONDONTWRITEBYTECODE

.PHONY: $(shell grep -oE '^[a-z][a-z0-9-]*( [a-z][a-z0-9-]*)*:' $(MAKEFILE_LIST) | tr -d ':')

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

$(UV):
	@python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: python3 is $$(python3 -V 2>&1 | cut -d' ' -f2); 3.11, 3.12 or 3.13 is needed" >&2; exit 2; }
	@echo "installing uv $(UV_VERSION) into $(INSTALLER)"
	@python3 -m venv $(INSTALLER) >/dev/null 2>&1 || { rm -rf $(INSTALLER); python3 -m virtualenv -q $(INSTALLER) 2>/dev/null; } \
	  || { echo "error: python3 cannot make a virtual environment here; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@$(INSTALLER)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# Bytecode is compiled at the first import of a module, because the demo imports only a fifth of 23,000 modules.
$(STAMP): pyproject.toml uv.lock | $(UV)
	@echo "installing the locked packages into .venv (minutes on a slow network, seconds after that)"
	@$(UV) sync --frozen --extra cpu --extra operator --group dev --no-progress --python "$$(command -v python3)" 2>&1 | sed -u '/^ [+~-] /d'
	@$(BIN)/python -c 'import grounding' && touch $@

setup: $(STAMP) ## create .venv with everything that the demo and the tests need

demo: setup ## run SFT, RL and the eight-file evaluation of a tiny model on this machine; about ten minutes
	@echo "running jobs/demo.yaml: SFT, RL and the evaluation of a tiny model; the same command continues after a stop"
	@$(BIN)/egm run -f jobs/demo.yaml

PYTEST := $(BIN)/python -m pytest -q
JOBS   := 2
# each file of the stack's tests goes to one process, because its fixtures train models
test: setup lint types ## run all tests that need neither a cluster nor root, JOBS=2 at a time; half an hour on two cores
	@for part in "unit -n $(JOBS)" browser evaluate_kill "s3 -n $(JOBS)" "stack -n $(JOBS) --dist loadfile"; do \
	  echo "tests/$$part"; $(PYTEST) tests/$$part -m 'not train and not gang' || exit 1; done

test-unit: setup ## run the fast tests; one or two minutes
	@$(PYTEST) tests/unit -n $(JOBS)

test-faults: setup ## run jobs with N=200 random kills, disk errors and power cuts, and compare the results (S3=1: with a real S3 server)
	@$(BIN)/python tests/faults/trials.py -n $(or $(N),200) --seed $(or $(SEED),1) $(if $(S3),--s3)

REFERENCE := datasets==5.2.0 openai==3.57.0 pillow tqdm numpy
test-reference: setup # compare with the reference's own scripts; EGM_REFERENCE=a checkout of github.com/zgq1879/EGM
	@test -f "$(EGM_REFERENCE)/verl/scripts/sglang_infer.py" || { echo "error: EGM_REFERENCE must be a checkout of github.com/zgq1879/EGM" >&2; exit 2; }
	@$(UV) venv --quiet --allow-existing .cache/reference
	@VIRTUAL_ENV=.cache/reference $(UV) pip install --quiet $(REFERENCE)
	@EGM_REFERENCE_PYTHON=$(abspath .cache/reference/bin/python) $(PYTEST) tests/reference

# not in uv.lock, because they need older versions of other packages (trackio of Pillow, inspect_ai of fsspec)
EXPORTERS := inspect_ai==0.3.285 wandb==0.31.0 trackio==0.43.0 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
test-export: setup # test the exporters with the tools for which they write, in a separate environment
	@$(UV) venv --quiet --allow-existing .cache/export
	@VIRTUAL_ENV=.cache/export $(UV) pip install --quiet -e . $(EXPORTERS) hypothesis==6.170.15 pytest==9.2.0 pytest-asyncio==1.5.0 pytest-timeout==2.4.0
	@.cache/export/bin/python -m pytest -q tests/export

# the property tests of what reads foreign bytes: manifests, rows, archives, answers, metrics, reports, checkpoints
READERS := api data evaluate local/test_runs.py models/test_folder.py operator/plan operator/test_judges.py operator/test_metrics.py \
  operator/test_warnings_reader.py runtime scoring test_errors.py test_files.py test_progress.py test_storage.py train/checkpoints view
fuzz: setup ## run the property tests of all readers again and again, each time with another seed, for MINUTES=10
	@end=$$(($$(date +%s) + 60 * $(or $(MINUTES),10))); seed=$$(date +%s); \
	while [ $$(date +%s) -lt $$end ]; do seed=$$((seed + 1)); \
	  $(BIN)/python -m pytest -q -x -m hypothesis -p no:cacheprovider --hypothesis-seed=$$seed $(READERS:%=tests/unit/%) || exit 1; done

CONTROL_PLANE := walk crds editor judges drift chart_render chart_rbac runbooks operator_reasons operator_faults operator_killed operator_many operator_progress
test-control-plane: setup cluster-programs ## test operator and chart on a real control plane; half an hour more if its programs must be built
	@$(BIN)/python -m pytest -q $(CONTROL_PLANE:%=tests/cluster/test_%.py)

test-kueue: setup cluster-programs ## test jobs in the queues of a real Kueue; ten minutes more if it must be built; CI leaves it out
	@$(BIN)/python -m pytest -q tests/cluster/test_kueue.py

test-cluster: setup prometheus ## run all cluster tests, on the cluster of `make cluster` or of EGM_KUBECONFIG
	@$(BIN)/python -m pytest -q tests/cluster

chart: setup ## write the generated parts of the chart: definitions, table of values, dashboards
	@$(BIN)/python hack/chart/generate.py

# in separate environments, because checkov pins many packages
lint-chart: setup ## run checkov and kube-score on the rendered chart
	@$(UV) venv --quiet --allow-existing .cache/checkov
	@VIRTUAL_ENV=.cache/checkov $(UV) pip install --quiet checkov==3.3.30
	@$(BIN)/python hack/chart/lint.py

docs: setup ## build the documentation as a site in .cache/site
	@$(BIN)/python hack/docs/reference.py
	@$(UV) venv --quiet --allow-existing .cache/mkdocs
	@VIRTUAL_ENV=.cache/mkdocs $(UV) pip install --quiet mkdocs==1.6.1 mkdocs-material==9.8.1
	@NO_MKDOCS_2_WARNING=1 .cache/mkdocs/bin/mkdocs build --quiet

PROMETHEUS := .cache/prometheus
$(PROMETHEUS)/usr/bin/prometheus:
	@mkdir -p $(PROMETHEUS)
	@cd $(PROMETHEUS) && apt-get download -qq prometheus && for f in prometheus_*.deb; do dpkg -x "$$f" . && rm "$$f"; done

prometheus: # install Debian's Prometheus and promtool in .cache, unless they are on PATH
	@{ command -v prometheus && command -v promtool; } >/dev/null 2>&1 || ! command -v apt-get >/dev/null \
	  || $(MAKE) -s $(PROMETHEUS)/usr/bin/prometheus

cluster: ## start a real Kubernetes 1.34 with simulated GPU nodes, without root (NODE=1: like `make node`; FAKE_NODES=n)
	@python3 hack/cluster/cluster.py up $(if $(FAKE_NODES),--fake-nodes $(FAKE_NODES)) $(if $(filter 1,$(NODE)),--node)

cluster-programs: # build the cluster's programs, as `make cluster` does if they are missing; half an hour, once per version
	@python3 hack/cluster/cluster.py build

node: ## start the same with a real node (containerd, kubelet, kube-proxy, CoreDNS) on this machine; needs root
	@python3 hack/cluster/cluster.py up --node $(if $(FAKE_NODES),--fake-nodes $(FAKE_NODES))

node-images: images # import the images of `make images` into the real node
	@python3 hack/cluster/cluster.py load $(addprefix localhost/egm-,operator:$(or $(TAG),dev) train:$(or $(TAG),dev)-cpu infer:$(or $(TAG),dev)-cpu)

# IMAGES=checkout: use this checkout's environment instead of built images, which is faster
NODE_IMAGES = $(if $(filter checkout,$(IMAGES)),cluster-image,node-images)
test-node: setup node $(NODE_IMAGES) ## test images, the chart's release, and a training that loses one of two pods; needs root and buildah; ten minutes
	@$(BIN)/python -m pytest -q -s tests/e2e/test_gang.py

test-firewall: setup node ## show that the NetworkPolicies of jobs keep other pods out, on a real node; needs root and ipset; three minutes, six more if kube-router must be built
	@python3 hack/cluster/cluster.py firewall
	@$(BIN)/python -m pytest -q tests/cluster/test_network_policies.py

e2e: setup node $(NODE_IMAGES) ## run the whole pipeline as pods on a real node, with disturbances; needs root and buildah; half an hour
	@$(BIN)/python -m pytest -q -s tests/e2e

kueue: ## start Kueue on the running test cluster (PYTORCHJOB=1: with that integration; OFF=1: remove it)
	@python3 hack/cluster/cluster.py kueue $(if $(filter 1,$(PYTORCHJOB)),--pytorchjob) $(if $(filter 1,$(OFF)),--off)

cluster-env: # print the cluster's shell exports: eval "$$(make -s cluster-env)"
	@python3 hack/cluster/cluster.py env

cluster-image: setup # import this checkout's environment as the operator's images into the node of `make cluster NODE=1`
	@python3 hack/cluster/cluster.py image

walk: # do a user's steps in a clean clone: cluster, apply, suspend, resume, delete; takes minutes
	@hack/walk

cluster-down: ## stop the cluster and remove its files
	@python3 hack/cluster/cluster.py down

locks: | $(UV) ## write the images' lock files again (UPGRADE=1: with the newest compatible versions)
	@UV=$(abspath $(UV)) python3 images/locks.py refresh $(if $(UPGRADE),--upgrade)

locks-check: | $(UV) # resolve the locks again and show what would change
	@UV=$(abspath $(UV)) python3 images/locks.py check

LOCKS ?= $(wildcard images/*/requirements*.txt)
# in a separate environment, like checkov
audit: | $(UV) ## list known vulnerabilities of the images' locked packages by pip-audit; queries osv.dev (SERVICE=pypi: PyPI)
	@$(UV) venv --quiet --allow-existing .cache/audit
	@VIRTUAL_ENV=.cache/audit $(UV) pip install --quiet pip-audit==2.10.1
	@bad=0; for lock in $(LOCKS); do echo "$$lock"; \
	  .cache/audit/bin/pip-audit --progress-spinner off --disable-pip --require-hashes -s $(or $(SERVICE),osv) -r $$lock || bad=1; done; exit $$bad

images: image-operator image-train image-infer ## build all images with buildah as root (VARIANT=cpu or gpu, ENGINE=sglang or vllm, TAG=dev, BASE=...)

image-operator image-train image-infer:
	@images/build.sh $(@:image-%=%)

push: ## push the images to a registry: REGISTRY=registry.example.org/egm (VARIANT, ENGINE, TAG as for images; INSECURE=1: without TLS)
	@images/push.sh "$(REGISTRY)"

# Debian's docker-registry, which the test of `make push` starts
REGISTRY_PROGRAM := .cache/registry
$(REGISTRY_PROGRAM)/usr/bin/docker-registry:
	@mkdir -p $(REGISTRY_PROGRAM)
	@cd $(REGISTRY_PROGRAM) && apt-get download -qq docker-registry && for f in docker-registry_*.deb; do dpkg -x "$$f" . && rm "$$f"; done

registry: # install Debian's docker-registry in .cache, unless it is on PATH
	@command -v docker-registry >/dev/null || ! command -v apt-get >/dev/null \
	  || $(MAKE) -s $(REGISTRY_PROGRAM)/usr/bin/docker-registry || echo "no docker-registry: the test of make push will be skipped"

test-images: setup registry # build and run the images, resolve and install their locks; needs root and buildah; half an hour
	@$(BIN)/python -m pytest -q -s tests/images

test-install: setup registry ## follow docs/install.md with a local registry on a real node; needs root and buildah; half an hour with the build of images
	@$(BIN)/python -m pytest -q -s tests/install

lint: setup ## run ruff and the import rules, like CI
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports --no-cache

format: setup ## format the code and apply ruff's fixes
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

types: setup ## run mypy --strict on the package
	@$(BIN)/mypy

bench: setup ## run the comparisons that need no special machine; JSON with machine and load in .cache/bench (ONLY="scoring reward"; RECORD=1: in bench/results, for the docs)
	@$(BIN)/python bench/side_by_side.py $(if $(ONLY),--only $(ONLY)) $(if $(filter 1,$(RECORD)),--out bench/results)

clean: cluster-down ## remove everything that make and the runs have created
	rm -rf .venv .cache runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
