# make help lists the targets. Each sets up .venv first; PYTHON names the interpreter to make it with (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
# a worker for each core; tests/conftest.py gives each one thread
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
NUMERIC := $(addprefix tests/test_,$(addsuffix .py,golden gradrewire deeprewire rewiring optimizer_state optimizer_tensors plain_groups connectivity_schedule schedule kernels blocks convolutions proof models ranks sparse step measure energy))
DEMO = $(BIN)/python mnist/mnist.py --dataset digits --recipe fast -b 32 -lr 3e-3 --dump-dir runs/demo
# two threads that wait actively for each other on a busy machine are many times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-all test-numeric kill-test fuzz sanitize docs lint bench gpu clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: .venv/ready ## train the MNIST network on small digits, dense and with 5 % of its connections, and compare the two
	$(DEMO)
	$(DEMO) -m grad --connectivity 0.05
	@echo
	$(BIN)/python -m analysis.report runs/demo -o runs/demo/report.html

test: .venv/ready ## run the tests, except those that take minutes
	$(PYTEST) -m "not slow"

test-all: .venv/ready ## run all tests
	$(PYTEST)

# for other arithmetic: ATEN_CPU_CAPABILITY=default make test-numeric. Left out are Triton's tests, which do not depend
# on it, and those that show that wrong code misses the bounds
test-numeric: .venv/ready ## run the tests whose numbers depend on the processor's arithmetic
	$(PYTEST) -m "not slow" -k "not triton and not tells_ and not network_is_told and not are_told" $(NUMERIC)

kill-test: .venv/ready ## kill a run 50 times at random moments, and check that its result stays the same
	KILLS=50 $(BIN)/python -m pytest -s tests/test_kill.py

# some formats alone: make fuzz FUZZ="nir --mutations 100"
fuzz: .venv/ready ## damage exports and checkpoints, 2000 of each format; each must be refused, or load as a sound network
	PYTHONPATH=. $(BIN)/python tests/fuzz.py $(FUZZ)

# by clang's: make sanitize CC=clang
sanitize: .venv/ready ## call the C code at random under AddressSanitizer and UBSan
	$(BIN)/python -m tests.sanitize

docs: .venv/ready ## write the tables of docs/metrics.md anew from training/metrics.py
	$(BIN)/python -m training.metrics

lint: .venv/ready ## check the code with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# some parts alone, on real images: make bench BENCH="--only mnist --dataset-dir data --json results.json"
bench: .venv/ready ## measure speed and memory
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.bench $(BENCH)

# make gpu GPU="--dataset-dir data --out gpu-report"
gpu: .venv/ready ## tell in ten minutes what all of this does on a GPU: tests, equality, speed, memory, training
	$(BIN)/python -m benchmarks.gpu $(GPU)

clean: ## remove .venv
	rm -rf .venv

.venv/ready: requirements.txt tests/requirements.txt constraints.txt
	@$(PYTHON) -c 'import os, sys; sys.exit(sys.version_info < (3, 11) and os.environ.get("PYTHON", "python3") + " is Python " + sys.version.split()[0] + ", and 3.11 or newer is needed: set PYTHON, as in make PYTHON=python3.12")'
	@if [ "$$(uname -s)" = Linux ]; then \
	    echo "Setting up .venv: about 3 GB to download, 6 GB on disk, most of it PyTorch's CUDA libraries. The CPU build is"; \
	    echo "much smaller: stop this, and put PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu before make."; \
	fi
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt -c constraints.txt
	touch $@
