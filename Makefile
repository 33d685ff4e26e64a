PYTHONS := 3.12 3.13 3.14
VENV := .venv
PYTHON := $(VENV)/bin/python
GOLDEN_PYTHON := .venv-golden/bin/python
PIP_INSTALL := -m pip -qq --disable-pip-version-check install
INSTALLED := $(VENV)/installed $(VENV)/installed-test $(VENV)/installed-plot $(VENV)/installed-dev
GOLDEN_PACKAGES := torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
MODELS := $(wildcard ../shared/models)
PYTEST_FLAGS ?=
# the environment holds the JAX for CPU; libtpu, which the tests compile with, would be asked for a TPU otherwise
export JAX_PLATFORMS ?= cpu

.DEFAULT_GOAL := help
.PHONY: help demo test lint style types format golden benchmark clean

help:
	@echo 'make demo       generate text with the model that ships with the package'
	@echo 'make test       run all the tests; PYTEST_FLAGS="-m \"not slow\"" leaves the slow ones out'
	@echo 'make lint       check style and types (make style, make types)'
	@echo 'make format     rewrite the files in the style that lint asks for'
	@echo 'make benchmark  measure sizes and speed on this machine'
	@echo 'make golden     write the reference outputs in tests/golden anew, with PyTorch'
	@echo 'make clean      remove the virtual environments and caches'
	@echo 'Each sets up what it needs in $(VENV) first; VENV=... names another environment.'

demo: $(VENV)/installed
	@$(PYTHON) scripts/demo.py

test: $(VENV)/installed-test
	@$(PYTHON) -m pytest --numprocesses=2 --dist=worksteal $(PYTEST_FLAGS)

lint: style types

style: $(VENV)/installed-dev
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check

types: $(VENV)/installed-dev
	@$(PYTHON) -m basedpyright --pythonpath $(PYTHON)

format: $(VENV)/installed-dev
	@$(PYTHON) -m ruff check --fix
	@$(PYTHON) -m ruff format

benchmark: $(VENV)/installed-plot
	@$(PYTHON) -m benchmarks.run

golden: .venv-golden/installed
	@$(GOLDEN_PYTHON) scripts/write_golden.py tests/golden $(if $(MODELS),--models $(MODELS))
	@$(GOLDEN_PYTHON) scripts/write_golden_chat.py tests/golden/chat

clean:
	rm -rf .venv* build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

installed_in := $(shell $(PYTHON) -c 'print(open("$(VENV)/folder").read(), end="")' 2>/dev/null)
ifneq ($(installed_in),$(CURDIR))
.PHONY: $(INSTALLED)
endif

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  found="$$(bash scripts/find_python.sh $(PYTHONS))" && "$$found" -m venv --clear $(VENV); }
	@echo 'Installing into $(VENV); the first time takes a minute or two.'
	@$(PYTHON) $(PIP_INSTALL) -c constraints.txt -e '.$(patsubst -%,[%],$(patsubst $(VENV)/installed%,%,$@))'
	@printf '%s' '$(CURDIR)' > $(VENV)/folder
	@touch $(VENV)/installed $@ $(if $(filter %-dev,$@),$(INSTALLED))

.venv-golden/installed: Makefile
	@$(GOLDEN_PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  found="$$(bash scripts/find_python.sh 3.11)" && "$$found" -m venv --clear .venv-golden; }
	@echo 'Installing PyTorch into .venv-golden; this takes a few minutes.'
	@$(GOLDEN_PYTHON) $(PIP_INSTALL) $(GOLDEN_PACKAGES)
	@touch $@
