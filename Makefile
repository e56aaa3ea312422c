# Every target makes .venv by itself: python3 -m venv, pip, the pins of requirements.txt, this project in place.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: venv demo demo-controlnet test bench lint clean

venv: .venv/made
.venv/made: requirements.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: venv
	$(BIN)/python examples/demo_flux_lora.py

demo-controlnet: venv
	$(BIN)/python examples/demo_flux_controlnet.py

test: venv
	$(BIN)/python -m pytest tests

bench: venv
	$(BIN)/python benchmarks/encoder_memory.py
	$(BIN)/python benchmarks/controlnet_memory.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info
