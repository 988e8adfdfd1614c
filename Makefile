# Targets that a person would guess. Each installs what it needs first; `make help` lists them.
PYTHON ?= python3
# The release that the tests and the committed bundle were made with; pyproject.toml admits others.
TORCH := torch==2.14.1 torchvision==0.29.1
RUN := .venv/bin/python
PORT ?= 8001
METRICS_PORT ?= 8002
SEEDS ?= 1
DATA ?= fashion-mnist
RUNS := runs/$(if $(filter fashion-mnist,$(DATA)),fm,$(DATA))
NAME := $(subst -,_,$(DATA))
# Two tests at a time; files are dealt out as wholes (tests/conftest.py).
WORKERS := -n 2 --dist loadscope --no-loadscope-reorder -p no:cloudcoil
TEST_SYSTEM_PACKAGES := dataset-fashion-mnist bubblewrap prometheus strace jq fonts-dustin fonts-eurofurence fonts-liberation chromium chromium-driver docker-registry skopeo
TYPEFACES = $(shell grep -v '^\#' training/data/typefaces.txt)
# The major release that MkDocs Material is made for.
MERMAID := 11.17.2
TARGET ?= cpu
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
COMPILE = $(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --custom-compile-command 'make lock'

.PHONY: help demo docs serve playground test test-fast lint format proto dashboards schemas reference train reproduce export bench bench-peers gpu-check soak crash audit faults lock image push sbom chart manifests deploy-check clean system-python system-test typefaces

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: .venv/.base  ## A real server, the sample images through it with and without steering (installs no torch)
	@$(RUN) -m service.demo

serve: .venv/.base  ## Serve deploy/models on PORT (8001) and METRICS_PORT (8002)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(RUN) -m service --repository deploy/models --port $(PORT) --metrics-port $(METRICS_PORT)

playground: .venv/.playground  ## A page to try it on http://127.0.0.1:8003, with a server of its own (SERVER=HOST:PORT: with that one)
	@$(RUN) -m service.playground $(if $(SERVER),--server $(SERVER))

test: .venv/.dev system-test  ## All tests
	$(RUN) -m pytest --ignore tests/deploy $(WORKERS) --durations=20

test-fast: .venv/.dev system-test  ## The tests that take seconds
	$(RUN) -m pytest --ignore tests/deploy $(WORKERS) -m "not slow and not processes"

lint: .venv/.dev  ## Style, format, types, known weaknesses and spelling
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m bandit --quiet --recursive --configfile pyproject.toml service export training
	.venv/bin/codespell *.md Makefile pyproject.toml deploy docs export proto service tests training
	$(RUN) -m pytest --quiet tests/test_project.py -k wording

format: .venv/.dev  ## Rewrite the code in the project's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

proto: .venv/.dev  ## Generate service/pb from proto/
	$(RUN) -m grpc_tools.protoc -Iservice/pb=proto --python_out=. --pyi_out=. --grpc_python_out=. service/pb/steering.proto service/pb/open_inference.proto

dashboards: .venv/.dev  ## Write deploy/dashboards/*.json from the Python beside them
	$(RUN) -m deploy.dashboards

schemas: .venv/.dev  ## Write docs/schemas/*.json, the JSON Schemas of manifest.json, profiles.json and serving.json
	$(RUN) -m export.schemas
	$(RUN) -m service.serving_file

reference: .venv/.dev  ## Write docs/cli.md, the reference of the command line, from the flags in the code
	$(RUN) -m service.cli_page

train: .venv/.dev system-test  ## Train the Fashion-MNIST model of the demo into runs/fm/seed-0, without its controls
	$(RUN) -m training all --preset fashion-mnist --out runs/fm/seed-0

reproduce: .venv/.dev system-test $(filter typefaces,$(DATA))  ## Data to report and bundle, with all controls, of DATA (fashion-mnist; typefaces) for SEEDS (1) seeds; resumable
	$(RUN) -m training.reproduce --preset $(DATA) --out $(RUNS) --seeds $(SEEDS)
	test -d $(RUNS)/models/$(NAME)/1 || $(RUN) -m export $(RUNS)/seed-0 $(RUNS)/models --name $(NAME)

typefaces:  ## Install the Debian packages of the data set `typefaces` (140 MB)
	@$(call install_missing,$(TYPEFACES))

export: .venv/.dev  ## Write runs/fm/seed-0 as the next version of deploy/models/fashion_mnist
	$(RUN) -m export runs/fm/seed-0 deploy/models --name fashion_mnist

docs: build/mermaid-$(MERMAID).js  ## README and docs as a site in build/docs, with every link checked
	MERMAID=$(abspath $<) NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml

bench: .venv/.bench  ## What closed heads save, as wall time, into build/bench (QUICK=1: a minute)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(RUN) -m tests.perf.heads $(if $(QUICK),--quick)
	$(if $(QUICK),,GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(RUN) -m tests.perf.serving)

bench-peers: .venv/.dev  ## steervit and Triton on the same graphs and cores, under perf_analyzer, into build/bench
	$(RUN) -m tests.perf.peers

gpu-check: .venv/.dev  ## What a GPU gives: right, fast, through gRPC; without one, the part that a CPU can check
	$(RUN) -m tests.perf.gpu $(if $(QUICK),--quick)

soak: .venv/.dev  ## 50,000 calls, a third in brownout, and 50 stops, every answer compared with that of a single request; MINUTES=60: with disturbances
	$(RUN) -m tests.perf.soak $(if $(MINUTES),--minutes $(MINUTES))
	$(if $(MINUTES),,$(RUN) -m tests.faults.sigterm --rounds 50)

faults: .venv/.dev  ## Write tests/README.md: each fault, what a client sees, the test that shows it
	$(RUN) -m tests.faults.table

# PYTHON_IMAGE and PIP_INDEX_URL: mirrors.
BUILD_ARGS = --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) \
	$(foreach name,PYTHON_IMAGE PIP_INDEX_URL,$(if $($(name)),--build-arg $(name)=$($(name))))

image:  ## Build the image steervit:<version>-TARGET (cpu, cuda, delivery or demo) with docker (PYTHON_IMAGE, PIP_INDEX_URL: from mirrors)
	docker build -f deploy/Dockerfile --target $(TARGET) -t steervit:$(VERSION)-$(TARGET) $(BUILD_ARGS) .

# An onnxruntime for CUDA on arm64 is not in PyPI.
PLATFORMS ?= linux/amd64$(if $(filter-out cuda,$(TARGET)),$(comma)linux/arm64)
comma := ,
push:  ## Build the image of TARGET for PLATFORMS (amd64 and arm64; cuda: amd64), with provenance and SBOM, and push it to REGISTRY (such as ghcr.io/you)
	@test -n "$(REGISTRY)" || { echo "make push needs REGISTRY, such as REGISTRY=ghcr.io/you"; exit 1; }
	@mkdir -p build
	docker buildx build -f deploy/Dockerfile --target $(TARGET) --platform $(PLATFORMS) --provenance mode=max \
		--attest type=sbom$(if $(SBOM_GENERATOR),$(comma)generator=$(SBOM_GENERATOR)) \
		--tag $(REGISTRY)/steervit:$(VERSION)-$(TARGET) $(BUILD_ARGS) --metadata-file build/push-$(TARGET).json --push .

sbom: .venv/.dev  ## Write build/sbom/steervit-<version>-<target>.cdx.json, the images' Python packages as CycloneDX
	@mkdir -p build/sbom
	@set -e; for target in cpu cuda delivery demo; do \
		$(RUN) -m deploy.sbom $$target > build/sbom/steervit-$(VERSION)-$$target.cdx.json; \
	done

# The CPU image runs the release of onnxruntime that the CUDA image and the tests run, without CUDA.
lock: .venv/.dev  ## Write deploy/requirements-*.lock anew: the newest releases that pyproject.toml admits, with hashes
	echo 'onnxruntime-gpu[cuda,cudnn]' | $(COMPILE) pyproject.toml - --extra otel --no-emit-package onnxruntime -o deploy/requirements-cuda.lock
	sed -n 's/^onnxruntime-gpu\(==[^ ;]*\).*/onnxruntime\1/p' deploy/requirements-cuda.lock \
		| $(COMPILE) pyproject.toml - --extra otel --no-emit-package onnxruntime-gpu -o deploy/requirements-cpu.lock
	sed -n 's/^\(onnxruntime==[^ ;]*\).*/\1/p' deploy/requirements-cpu.lock | $(COMPILE) pyproject.toml - --extra otel --extra playground \
		--constraint deploy/requirements-cpu.lock --no-emit-package onnxruntime-gpu -o deploy/requirements-demo.lock
	sed -n 's/^\(onnxruntime==[^ ;]*\).*/\1/p' deploy/requirements-cpu.lock | $(COMPILE) pyproject.toml - --extra otel --extra delivery \
		--constraint deploy/requirements-cpu.lock --no-emit-package onnxruntime-gpu -o deploy/requirements-delivery.lock
	echo 'setuptools>=77' | $(COMPILE) - -o deploy/requirements-build.lock

chart: .venv/.dev  ## Write build/chart/steervit-<version>.tgz, the Helm chart as a package
	$(RUN) -m deploy.kubernetes.tools
	build/tools/helm package deploy/helm --destination build/chart

manifests: .venv/.dev  ## Write the rules that are made from deploy/slo.yaml, the Kubernetes objects of deploy/alerts, and the chart's schema
	$(RUN) -m deploy.slo
	$(RUN) -m deploy.kubernetes.prometheus_rules
	$(RUN) -m deploy.helm_schema

deploy-check: .venv/.dev system-test  ## deploy/kubernetes: built, against schemas, scanned, compared with the code; the image rehearsed
	$(RUN) -m deploy.kubernetes.tools
	$(RUN) -m pytest tests/deploy

crash: .venv/.dev  ## ROUNDS (50) kills of every writer, at random moments; the tests do 8
	CRASH_ROUNDS=$(or $(ROUNDS),50) $(RUN) -m pytest tests/test_crash_safety.py

audit: .venv/.dev  ## For information: what is known of the installed packages (pip-audit asks PyPI)
	-$(RUN) -m pip_audit --progress-spinner off --skip-editable

clean:  ## Remove .venv and caches (not runs/)
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/.base: pyproject.toml | system-python
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.playground: .venv/.base
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[playground]'
	@touch $@

.venv/.dev: pyproject.toml | system-python
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH) -e '.[train,export,playground,dev]'
	@touch $@ .venv/.base .venv/.playground

.venv/.docs: .venv/.dev
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

# From npm, by the npm in .venv: diagrams are drawn without a network.
build/mermaid-$(MERMAID).js: .venv/.docs
	mkdir -p build
	cd build && PATH="$(abspath .venv/bin):$$PATH" npm pack --silent mermaid@$(MERMAID)
	tar -xzOf build/mermaid-$(MERMAID).tgz package/dist/mermaid.min.js > $@.part
	mv $@.part $@

.venv/.bench: .venv/.dev
	$(if $(QUICK),,$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[bench]')
	@$(if $(QUICK),,touch $@)

# Debian and Ubuntu split venv off from python3.
system-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 or later is needed: $(PYTHON) is not. Give another one: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call system_install,python3-venv)

system-test:
	@$(call install_missing,$(TEST_SYSTEM_PACKAGES))

# Those of these Debian packages that are not installed.
define install_missing
missing=; for package in $(1); do \
	dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
done; [ -z "$$missing" ] || $(call system_install,$$missing)
endef

# Install Debian packages as root; else say how, and fail.
define system_install
{ if [ "$$(id -u)" = 0 ]; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1); \
else \
	echo "Missing system packages. Run: sudo apt-get install -y --no-install-recommends $(1)"; exit 1; \
fi; }
endef
