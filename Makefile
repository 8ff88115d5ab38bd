# make demo: train a small spiking network with Grad Rewiring; make test: run the tests, but those that take minutes;
# make test-all: run all; make test-numeric: run those whose numbers depend on the processor's arithmetic;
# make bench: measure speed; make kill-test: kill a run 50 times;
# make fuzz: 2000 damaged files of each format, each refused or loaded as the same network;
# make sanitize: random calls of the C code under AddressSanitizer and UBSan (CC=clang for clang's).
# Each sets up .venv first; PYTHON names the interpreter to make it with (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
# a worker for each core; tests/conftest.py gives each one thread
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
NUMERIC := $(addprefix tests/test_,$(addsuffix .py,golden gradrewire deeprewire rewiring optimizer_state optimizer_tensors kernels proof models sparse step measure energy))
# two threads that wait actively for each other on a busy machine are many times slower
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all test-numeric kill-test fuzz sanitize lint bench clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/python mnist/mnist.py --dataset digits -m grad -s 0.95 -penalty 5e-3 -lr 1e-3 -b 32 -N 60
	$(BIN)/python mnist/mnist.py --dataset digits -m grad -s 0.95 -penalty 5e-3 -lr 1e-3 -b 32 -test

test: .venv/ready
	$(PYTEST) -m "not slow"

test-all: .venv/ready
	$(PYTEST)

# for other arithmetic: ATEN_CPU_CAPABILITY=default make test-numeric
test-numeric: .venv/ready
	$(PYTEST) -m "not slow" $(NUMERIC)

# what belongs to a run: make bench BENCH="--dataset-dir data --json results.json"
bench: .venv/ready
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.bench $(BENCH)

# kill -9 at random moments, 50 times, and the same result
kill-test: .venv/ready
	KILLS=50 $(BIN)/python -m pytest -s tests/test_kill.py

# some formats alone: make fuzz FUZZ="nir --mutations 100"
fuzz: .venv/ready
	PYTHONPATH=. $(BIN)/python tests/fuzz.py $(FUZZ)

sanitize: .venv/ready
	$(BIN)/python -m tests.sanitize

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: requirements.txt tests/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv
