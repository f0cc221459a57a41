# `make VENV=/some/where test` keeps the environment elsewhere. Which build of torch is installed
# (CPU or CUDA) is decided by pip's configuration or by TORCH, e.g. TORCH=torch==2.13.0+cu130.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= diffusers,video,cli,atlas,export,tensorrt-rtx,dev
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
STAMP := $(VENV)/.tvkernels-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)

# What `make setup` was given a compiler for is compiled again when a source has changed.
CSRC := $(wildcard csrc/*.cpp csrc/*/*.* csrc/*/*/*.*)

.PHONY: setup native demo test test-slow test-oldest test-newest test-pythons lint bench bench-check
.PHONY: report gpu clean

setup: $(STAMP)

# torch comes first and by itself: whatever else would pull it in could bring another build along.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(CSRC)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# tvkernels/_C_cpu.so and, where nvcc is found, tvkernels/_C_cuda.so; an error where a compiler is
# missing. setup.py names the environment variables that steer it.
native:
	TVKERNELS_BUILD=1 $(BIN)/python setup.py --quiet build_ext --inplace

demo: setup
	$(BIN)/tvk demo

# One thread per worker: two workers with two threads each fight for two cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

# The tests under the oldest torch and triton that are supported, which pip brings with gigabytes
# of CUDA, and what goes with them: Triton 3.6's interpreter needs NumPy before 2.4.
OLDEST := torch==2.11.0 triton==3.6.0 torchvision==0.26.0 numpy==2.3.5 setuptools==81.0.0

test-oldest: build/oldest.txt
	$(MAKE) test VENV=build/oldest TORCH='$(firstword $(OLDEST))' CONSTRAINTS=$<

build/oldest.txt: constraints.txt Makefile
	@mkdir -p $(@D)
	sed $(foreach pin,$(OLDEST),-e '/^$(firstword $(subst ==, ,$(pin)))==/d') $< >$@
	printf '%s\n' $(OLDEST) >>$@

# The tests under the newest torch, triton and Python that are found, nothing pinned.
test-newest:
	@mkdir -p build
	@touch build/newest.txt
	$(MAKE) test VENV=build/newest PYTHON="$$($(PYTHON) .ci/pythons.py --newest)" TORCH="--upgrade torch" \
	    CONSTRAINTS=build/newest.txt

# Import and info under every Python that pyproject.toml promises and this machine has: gigabytes too.
test-pythons:
	$(PYTHON) .ci/pythons.py --install --torch '$(TORCH)'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

bench: setup
	$(BIN)/tvk bench quality --scenes 4
	$(BIN)/tvk bench ops

# What got slower or heavier: than a revision, measured in turns with it (AGAINST=HEAD~1), or than
# what `CHECK=--store` kept on this machine. Some minutes; an error where something did.
bench-check: setup
	$(BIN)/python -m tvkernels.benchmarks.check $(if $(AGAINST),--against $(AGAINST)) $(CHECK)

# The plots beside the page need matplotlib, of the extra `bench`.
report: setup
	$(BIN)/tvk report -o docs/report.html --readme

# Nothing is installed here: a machine with a GPU needs torch and triton, in the environment or in
# the python that is found first. TRITON_PTXAS_PATH names another ptxas, OUTPUT another folder for the
# rows. The CUDA library takes part where `make native` has built it.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks $(if $(OUTPUT),--output $(OUTPUT))

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache compile_commands.json tvkernels/_C_*.so
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
