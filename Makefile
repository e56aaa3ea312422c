# Every target makes .venv by itself: python3 -m venv, pip, the pins of requirements.txt, this project in place.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# MindSpore brings jemalloc. With glibc's allocator, operators take twice the time in a process that has compiled much.
WITH_JEMALLOC = LD_PRELOAD="$$(ls $(CURDIR)/.venv/lib/python3*/site-packages/mindspore/lib/libjemalloc.so.2 2> /dev/null)"

.PHONY: venv demo demo-controlnet demo-kontext demo-control-lora check test test-app bench parity contract rehearse lint clean

venv: .venv/made
.venv/made: requirements.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: venv
	$(WITH_JEMALLOC) $(BIN)/python examples/demo_flux_lora.py

demo-controlnet: venv
	$(WITH_JEMALLOC) $(BIN)/python examples/demo_flux_controlnet.py

demo-kontext: venv
	$(WITH_JEMALLOC) $(BIN)/python examples/demo_flux_kontext.py

demo-control-lora: venv
	$(WITH_JEMALLOC) $(BIN)/python examples/demo_flux_control_lora.py

# The fast tier, for every commit: lint, and unit tests and bad input that are not marked slow, in at most three
# minutes on two cores.
check: lint
	$(WITH_JEMALLOC) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/mindtune \
		$(wildcard tests/*/test_bad_input.py tests/*/*/test_bad_input.py) -m "not slow" -n auto --maxprocesses 4 --dist loadfile

# A process a core, each with one thread: compiling takes one, and learning tests side by side would crowd each other.
# Files are started in the order of tests/conftest.py, the slowest first, and not by their number of tests.
test: venv
	$(WITH_JEMALLOC) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests \
		-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Gradio and Playwright go into a .venv-app of their own, which takes everything else from .venv.
.venv-app/made: .venv/made setup.py tests/app/requirements.txt
	$(BIN)/python -m venv .venv-app
	ls -d $(CURDIR)/.venv/lib/python3*/site-packages > "$$(ls -d .venv-app/lib/python3*/site-packages)/venv.pth"
	.venv-app/bin/pip install --quiet --disable-pip-version-check -r tests/app/requirements.txt -e ".[app]"
	touch $@

# The form in a headless Chromium of the system (Debian: apt-get install chromium); about three minutes.
test-app: venv .venv-app/made
	.venv-app/bin/python tests/app/browser.py --screenshot build/app.png

bench: venv .venv-parity/made
	$(BIN)/python benchmarks/speed.py --torch .venv-parity/bin/python
	$(BIN)/python benchmarks/encoder_memory.py
	$(BIN)/python benchmarks/controlnet_memory.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/scale.py

# PyTorch and diffusers go into a .venv-parity of their own.
.venv-parity/made: tests/parity/requirements.txt
	$(PYTHON) -m venv .venv-parity
	.venv-parity/bin/pip install --quiet --disable-pip-version-check -r tests/parity/requirements.txt
	touch $@

parity: venv .venv-parity/made
	$(BIN)/python tests/parity/certificate.py --reference .venv-parity/bin/python

# mindone 0.5.0, which Ascend installs may have, goes into a .venv-contract of its own.
.venv-contract/made: tests/contract/requirements.txt
	$(PYTHON) -m venv .venv-contract
	.venv-contract/bin/pip install --quiet --disable-pip-version-check -r tests/contract/requirements.txt
	touch $@

contract: venv .venv-contract/made
	.venv-contract/bin/python tests/contract/contract.py --reference $(BIN)/python

# Every script on a simulated Ascend 910B; needs x86-64 Linux, gcc, g++ and binutils, and says so.
rehearse: venv
	$(BIN)/python tests/ascend/rehearse.py --write

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-app .venv-parity .venv-contract build *.egg-info
