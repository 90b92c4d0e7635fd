# make demo    the whole overlay as local processes: relocate, train, evaluate, serve, ask
# make test    lint, types and all tests
# make e2e     tests in the cluster that KUBECONFIG names: tests/e2e/README.md
# make scan    only the security scan of the rendered manifests and of the Dockerfiles
# make mutants    which small changes of the code that decides does no test notice? ARGS="jobs/core/plan.py": one module
# make kind    the same overlay in a cluster on this machine (docker and kind): images, cluster, progress, endpoint
# make kind-argocd    that, deployed by Argo CD: from your fork with REPO=https://… (REVISION=main), else from the commit here
# make kubeflow OVERLAY=overlays/kind ADAPTER=seville-hotels    a KubeFlow pipeline of an adapter's Jobs: docs/kubeflow.md
# make images   the two container images (FLAVOUR=cuda: for GPUs, ENGINE=podman); docs/registries.md
# make push REGISTRY=registry.example.com/team    to your registry; prints the digests to pin
# make bench-serving    what the guard costs vLLM: ten minutes on an idle machine (ARGS=--quick: three)
# make bench-many       what many adapters on one server cost: ten minutes on an idle machine (ARGS=--quick: three)
# make bench-training   what training costs, beside TRL and others: half an hour on an idle machine (ARGS=--quick: two minutes)
# make bench-evaluation    what measuring costs, beside one record at a time: fifteen minutes (ARGS=--quick: a minute)
# make bench-relocation  how fast a model is fetched, beside what is used instead: half an hour (ARGS=--quick: a minute)
# make bench-encoding    how fast a large dataset is encoded, and in how much memory: an hour (ARGS=--quick: a minute)
# Everything is installed into .venv by the first of them (about 3 GB, once).

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
UV := uv==0.13.9
TORCH := $(shell grep ^torch== jobs/requirements.txt)
OVERLAY ?= overlays/kind
QUESTION ?= What is the best hotel in Seville?
# Without a terminal for Ctrl-C, the demo exits when the question is answered. EXIT= keeps it running.
EXIT ?= $(shell test -t 0 || echo --exit)
# Modules of tests at a time: one more than two cores, because every module also waits, for servers and polls. Each takes
# up to 4 GB with its servers of real vLLM: WORKERS=2 for 8 GB of memory. torch gets one thread in each: on two cores, the
# threads of several processes would wait for each other.
WORKERS ?= 3
ENGINE ?= docker
FLAVOUR ?= cpu
# The tags that the overlays use: the version, with `-cuda` for GPUs.
TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)$(if $(filter-out cpu,$(FLAVOUR)),-$(FLAVOUR))

# Python writes bytecode beside what it imports, even if the environment says otherwise: uv installs none, and demo and
# tests start hundreds of processes that would compile torch, transformers and vLLM again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test e2e kind kind-argocd kubeflow scan mutants images push engine bench-serving bench-many bench-relocation bench-training bench-encoding bench-evaluation setup clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m jobs local $(OVERLAY) --ask "$(QUESTION)" $(EXIT) $(ARGS)

# mypy runs beside the tests: a minute of a core, which it takes when no test wants it.
test: setup .venv-checkov/installed .venv-kubeflow/installed
	$(BIN)/ruff check .
	nice -n 19 $(BIN)/mypy >.venv/mypy.txt 2>&1 & types=$$!; \
	  env -u KUBECONFIG OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile \
	    --no-loadscope-reorder; tests=$$?; \
	  wait $$types; types=$$?; echo "mypy:"; cat .venv/mypy.txt; exit $$((tests | types))

# Creates and removes namespaces, and drains a node: `make test` never runs it, even if KUBECONFIG is set.
e2e: setup
	$(BIN)/python -m pytest tests/e2e -x --log-cli-level=INFO $(ARGS)

scan: setup .venv-checkov/installed
	$(BIN)/python -m pytest tests/test_scan.py

# Slow; a run that was interrupted continues. docs/README.md says more.
mutants: setup .venv-mutants/installed
	$(BIN)/python tests/mutants.py $(ARGS)

KIND = $(BIN)/python -m jobs kind $(OVERLAY)
kind-argocd: KIND += --argocd $(if $(REPO),--repo "$(REPO)") $(if $(REVISION),--revision "$(REVISION)")
kind kind-argocd: setup
	$(KIND) --check
	$(MAKE) images
	$(KIND) $(EXIT) $(ARGS)

# ADAPTER= compiles one pipeline for all adapters. The file is not for git: it follows from the overlay.
kubeflow: .venv-kubeflow/installed
	@mkdir -p .local/kubeflow
	.venv-kubeflow/bin/python kubeflow/pipeline.py $(OVERLAY) $(if $(ADAPTER),--adapter $(ADAPTER)) \
	  --output .local/kubeflow/$(notdir $(patsubst %/,%,$(OVERLAY)))$(if $(ADAPTER),-$(ADAPTER)).yaml $(ARGS)

# DOCKER_BUILDKIT for Docker before 23. No attestations: they carry the time, so the same sources would give another
# digest each time. BUILD_ARGS is for the network you build in: docs/registries.md.
images: engine
	@case "$(FLAVOUR)" in cpu|cuda) ;; *) echo "error: FLAVOUR is '$(FLAVOUR)', must be cpu or cuda" >&2; exit 2; esac
	set -e; for name in jobs serving; do \
	  DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1 \
	  $(ENGINE) build --file $$name/Dockerfile --tag lora-gitops-$$name:$(TAG) \
	    --build-arg FLAVOUR=$(FLAVOUR) --build-arg VERSION=$(TAG) \
	    --build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --match= 2>/dev/null || echo unknown)" \
	    $(BUILD_ARGS) .; done

push: engine
	@test -n "$(REGISTRY)" || { echo "error: REGISTRY is not set: make push REGISTRY=registry.example.com/team" >&2; exit 2; }
	@set -e; for name in jobs serving; do \
	  $(ENGINE) image inspect lora-gitops-$$name:$(TAG) >/dev/null 2>&1 \
	    || { echo "error: there is no lora-gitops-$$name:$(TAG) to push;" \
	      "build it: make images FLAVOUR=$(FLAVOUR)" >&2; exit 2; }; \
	  $(ENGINE) tag lora-gitops-$$name:$(TAG) $(REGISTRY)/lora-gitops-$$name:$(TAG); \
	  $(ENGINE) push $(REGISTRY)/lora-gitops-$$name:$(TAG); done
	@echo; echo "images:  # for the overlay's kustomization.yaml"; for name in jobs serving; do \
	  echo "- name: lora-gitops-$$name"; echo "  newName: $(REGISTRY)/lora-gitops-$$name"; \
	  $(ENGINE) image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' $(REGISTRY)/lora-gitops-$$name:$(TAG) \
	    | sed -n 's#^$(REGISTRY)/lora-gitops-.*@#  digest: #p' | tail -n 1; done

engine:
	@command -v $(ENGINE) >/dev/null || { echo "error: $(ENGINE) is needed for container images: install it from" \
	  "https://docs.docker.com/engine/install/, or set ENGINE=podman" >&2; exit 2; }
	@$(ENGINE) info >/dev/null 2>&1 || { echo "error: $(ENGINE) is installed but does not answer; is its service running," \
	  "and may you use it? Try: $(ENGINE) info" >&2; exit 2; }

bench-serving: setup
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-many: setup
	$(BIN)/python -m benchmarks.many $(ARGS)

bench-relocation: setup
	$(BIN)/python -m benchmarks.relocation $(ARGS)

bench-training: setup
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-encoding: setup
	$(BIN)/python -m benchmarks.encoding $(ARGS)

bench-evaluation: setup
	$(BIN)/python -m benchmarks.evaluation $(ARGS)

setup: .venv/installed

# $(call install,VENV,WHAT): with uv, which is faster; with pip if uv is missing or fails. uv does not read pip's
# configuration, so it gets the index from there.
PIP_INDEX = $(BIN)/pip config list | sed -n "s/^\(:env:\|global\|install\)\.index-url='\(.*\)'$$/\2/p" | head -n 1
install = UV_SYSTEM_CERTS=1 UV_DEFAULT_INDEX="$$($(PIP_INDEX))" $(BIN)/uv pip install --python $(1)/bin/python \
	  --no-deps $(2) || $(1)/bin/pip install --no-deps $(2)

# --no-deps: the lists are complete, and the CPU build of vLLM requires packages that have no CPU build and break it.
# The CPU build of torch, because the default one brings gigabytes of CUDA: from the configured index if it has one,
# else from PyTorch's own.
.venv/installed: jobs/requirements.txt jobs/requirements-lm-eval.txt serving/requirements-cpu.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and \
	  f"error: Python 3.11 is needed (the CPU build of vLLM is made for it), this is {v[0]}.{v[1]}. " \
	  "Install it and run: make PYTHON=python3.11 ...")'
	@command -v kubectl >/dev/null || { echo "error: kubectl is needed to render the overlays (no cluster is): get 1.32" \
	  "or newer from https://kubernetes.io/docs/tasks/tools/" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv: about 3 GB, some minutes, once"
	$(BIN)/pip install --no-deps "$(TORCH)+cpu" \
	  || $(BIN)/pip install --no-deps "$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu
	-$(BIN)/pip install --no-deps $(UV)
	$(call install,.venv,-r serving/requirements-cpu.txt -r jobs/requirements-lm-eval.txt -r tests/requirements.txt)
	@touch $@

# The scanner (300 MB, half a minute), in its own environment: its dependencies conflict with vLLM's.
.venv-checkov/installed: tests/requirements-checkov.txt
	$(PYTHON) -m venv .venv-checkov
	$(call install,.venv-checkov,--quiet -r tests/requirements-checkov.txt)
	@touch $@

# kfp (130 MB, half a minute), in its own environment: its protobuf conflicts with vLLM's. Without .venv, which is not
# needed to compile a pipeline, pip installs it.
.venv-kubeflow/installed: kubeflow/requirements.txt
	$(PYTHON) -m venv .venv-kubeflow
	$(if $(wildcard $(BIN)/uv),$(call install,.venv-kubeflow,--quiet -r $<),.venv-kubeflow/bin/pip install --quiet --no-deps -r $<)
	@touch $@

# What is not in .venv, laid over it: the tests of a mutant run in .venv.
.venv-mutants/installed: tests/requirements-mutants.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv-mutants -r tests/requirements-mutants.txt
	@touch $@

clean:
	rm -rf .venv .venv-checkov .venv-kubeflow .venv-mutants .local
