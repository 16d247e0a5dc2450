# Two commands do everything on a fresh machine with Python 3.11+ and (better, not needed) a C++ compiler:
#   make demo    make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Packages are installed without bytecode: what is imported for the first time must be able to leave some.
unexport PYTHONDONTWRITEBYTECODE

CUDA_TRITONS = 3.4.0 3.5.1 3.6.0 3.7.0 3.7.1 3.8.0 3.9.0

.PHONY: setup demo test test-all test-ray gpu gpu-compile gpu-proof check docs format clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   only set up: $(BIN)/veneer (VENEER_ISAS=all: kernels for every instruction set, not for this machine's alone)"
	@echo "make demo    set up, fetch a small model, fine-tune it, show what changed (two cores: two to seven minutes, and five to ten for the set-up)"
	@echo "make test    set up, then the test suite; of the largest products of parameters a sample"
	@echo "make test-all  set up, then every case of the test suite, as CI does"
	@echo "make test-ray  the tests of training on a Ray cluster, whose packages go beside the others: build/ray"
	@echo "make gpu     45 minutes with a rented CUDA GPU: values, times, steps, serving; what is done is not run again (GPU=--rehearse: on the CPU)"
	@echo "make gpu-compile  compile every form of every Triton kernel by each Triton that torch pins, for six capabilities: an hour on two cores"
	@echo "make gpu-proof  what can be proven of the GPU kernels without one: order, bounds and memory in Triton's interpreter, few forms compiled"
	@echo "make check   lint, types, layers"
	@echo "make docs    the site: build/site/index.html"
	@echo "make format  rewrite the code in the house's format"

$(VENV)/.ready: pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "veneer needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@echo "1 of 3: an environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "2 of 3: pip, in its newest version"
	@$(BIN)/python -m pip install --quiet --no-compile --upgrade pip
	@echo "3 of 3: torch and the other packages, then veneer and its kernels: some minutes"
	@$(BIN)/python -c 'import tomllib; own = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*own["dependencies"], *own["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/needed.txt
	@# Packages are unpacked one by one, on one core: beside the compiler. --no-compile: Python compiles what is imported; pip
	@# would compile all of 20,000 files
	@test -t 1 || quiet=--quiet; scripts/compile_progress build & watcher=$$!; trap "kill $$watcher 2>/dev/null" EXIT; \
		$(BIN)/python -m pip install --quiet --no-compile --no-deps --editable . & kernels=$$!; \
		$(BIN)/python -m pip install $$quiet --no-compile --requirement $(VENV)/needed.txt; packages=$$?; \
		wait $$kernels && exit $$packages
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -W ignore -c 'import logging; logging.disable(logging.ERROR); import veneer.train.run, veneer.serve.llm, veneer.cli.train_run, peft'  # leaves their bytecode
	@touch $@
	@echo "ready: $(BIN)/veneer (source $(BIN)/activate puts it on the path)"

setup: $(VENV)/.ready

demo: setup
	$(BIN)/python examples/demo.py

test: SELECTED = -m "not full"
test test-all: setup
	$(BIN)/veneer fetch smollm2-135m-instruct
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(SELECTED)  # threads that wait do not spin beside the other process

# Ray and what it needs are in an environment that sees the other one, and is not seen by it: other tests are without Ray.
RAY_TESTS = tests/unit/ray tests/e2e/test_train_ray.py::test_asha_over_two_packs_trains_each_pack_as_one_process_does
test-ray: setup
	@$(PYTHON) -m venv --clear --without-pip build/ray
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > $$(echo build/ray/lib/python3*/site-packages)/beside.pth
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"], sep="\n")' > build/ray/needed.txt
	@$(BIN)/python -m pip --python build/ray/bin/python install --quiet --no-compile --requirement build/ray/needed.txt
	OMP_NUM_THREADS=1 build/ray/bin/python -m pytest --durations=5 $(RAY_TESTS)

# Without setup: a rented machine has a torch of its own, and maybe no network (scripts/gpu_wheels.py).
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu $(GPU)

gpu-compile: setup
	$(BIN)/python scripts/compile_triton.py --triton $(CUDA_TRITONS) --capability 8.0 8.6 8.9 9.0 10.0 12.0

# The values of the kernels with the grid run backwards in poisoned memory, then with every tensor fenced on either side;
# then that all forms compile.
gpu-proof: setup
	for way in order behind before; do PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -p hostile --hostile $$way $(PROVEN) || exit 1; done
	$(BIN)/python scripts/compile_triton.py --triton 3.6.0 3.7.1 3.9.0 --quick
PROVEN = -k "triton or device" tests/unit/ops tests/unit/model/fused/test_device_laws.py tests/unit/serve/test_device.py tests/unit/optim

check: setup
	VENV=$(VENV) scripts/check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)/docs.txt
	@$(BIN)/python -m pip install --quiet --requirement $(VENV)/docs.txt  # the extra alone: the kernels are built
	$(BIN)/python scripts/recipe_table.py > $(VENV)/recipe.md && mv $(VENV)/recipe.md docs/recipe.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "ready: build/site/index.html"

clean:
	rm -rf $(VENV) build
