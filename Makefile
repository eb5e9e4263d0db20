# Everything runs from a fresh clone with GNU make and Python 3.11 or newer, in a .venv made here.
# Another interpreter: make test PYTHON=python3.12 (after `make clean`, if .venv exists already).

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$python; break; }; done)
# Test processes side by side. Each is held to one thread, or they would fight over the cores.
WORKERS ?= 2
# torch is a reference in tests only, so its CPU build will do; pinned to the one tests ran with.
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST := NPROC=1 OMP_NUM_THREADS=1 JAX_PLATFORMS=cpu $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist worksteal
DEMO := outputs/demo
TINY := outputs/tiny
# XLA takes the memory of a step from malloc and gives it back, 4 kB at a time: with huge pages training
# on two cores is a sixth faster. glibc's; others do not read it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# What the demo shall show: make demo PROMPT="..."
PROMPT = a big yellow ball bounces on the floor
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo serve pocket pocket-report pocket-ranks pocket-ablations pocket-evaluate tiny test test-slow aot lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A clip of an earlier version does not say who wrote it, and so would not be replaced.
demo: $(VENV)/.installed-demo  ## the pocket model: from a sentence to 10 s of balls that bounce and ring
	@mkdir -p $(DEMO)
	@grep -qs launch.stream $(DEMO)/clip.mp4 || rm -f $(DEMO)/clip.mp4 $(DEMO)/clip.png
	$(BIN)/python -m checkpoint_converters.ltx2 --output $(DEMO)/checkpoint --overwrite \
		--input pocket/weights/student.safetensors pocket/weights/shared.safetensors
	$(BIN)/python -m checkpoint_converters.gemma3 --input pocket/weights/gemma \
		--output $(DEMO)/gemma --overwrite
	$(BIN)/python -m pocket.demo --checkpoint $(DEMO)/checkpoint --text-encoder $(DEMO)/gemma \
		--prompt "$$PROMPT" --output $(DEMO)
	@echo
	@echo "$(DEMO)/clip.mp4  10 s of video with sound, written while it was generated"
	@echo "$(DEMO)/clip.png  the same at a glance: frames, waveform, spectrogram; triangles mark"
	@echo "                       impacts seen (above) and tones heard (below)"
	@echo "Colours are red, yellow, green, cyan, blue and pink, sizes small, medium and large; one or"
	@echo "two balls: make demo PROMPT=\"a small green ball and a huge blue one hop in a dark room\""

serve: $(VENV)/.installed-serve  ## the pocket model live, in the browser: http://localhost:8000
	@mkdir -p $(DEMO)
	$(BIN)/python -m checkpoint_converters.ltx2 --output $(DEMO)/checkpoint --overwrite \
		--input pocket/weights/student.safetensors pocket/weights/shared.safetensors
	$(BIN)/python -m checkpoint_converters.gemma3 --input pocket/weights/gemma \
		--output $(DEMO)/gemma --overwrite
	$(BIN)/python -m launch.serve --checkpoint $(DEMO)/checkpoint --text-encoder $(DEMO)/gemma \
		--enlarge 8

tiny: $(VENV)/.installed-train  ## all three stages with random weights, then stream from the student
	@mkdir -p $(TINY)
	$(BIN)/python -m checkpoint_converters.synthetic --size tiny --version 2.0 \
		--output $(TINY)/ltx2.safetensors --overwrite
	$(BIN)/python -m checkpoint_converters.ltx2 --input $(TINY)/ltx2.safetensors \
		--output $(TINY)/ltx2 --overwrite
	$(BIN)/python -m checkpoint_converters.synthetic_gemma --size tiny --output $(TINY)/gemma_hf --overwrite
	$(BIN)/python -m checkpoint_converters.gemma3 --input $(TINY)/gemma_hf \
		--output $(TINY)/gemma --overwrite
	$(BIN)/python -m launch.encode_prompts --gemma $(TINY)/gemma --checkpoint $(TINY)/ltx2 \
		--prompts configs/example_prompts.txt --output $(TINY)/prompts
	$(BIN)/python -m launch.stage1 --config=configs/stage1.py:tiny --workdir=$(TINY)/stage1
	$(BIN)/python -m launch.ode_pairs --text $(TINY)/prompts --checkpoint $(TINY)/ltx2 \
		--generator $(TINY)/stage1 --layout prefix --output $(TINY)/ode_pairs
	$(BIN)/python -m launch.stage2 --config=configs/stage2.py:tiny --workdir=$(TINY)/stage2
	$(BIN)/python -m launch.stage3 --config=configs/stage3.py:tiny --workdir=$(TINY)/stage3
	$(BIN)/python -m launch.plot_run $(TINY)/stage1 $(TINY)/stage2 $(TINY)/stage3 \
		--output $(TINY)/curves.png
	$(BIN)/python -m launch.export_run --run $(TINY)/stage3 --output $(TINY)/student --overwrite
	$(BIN)/python -m launch.stream --checkpoint $(TINY)/student --text-encoder $(TINY)/gemma \
		--prompt "a bell rings twice" --seconds 3 --output $(TINY)/clip.mp4 --overwrite
	@echo
	@echo "$(TINY)/curves.png   the three runs; their sample clips are in $(TINY)/stage*/samples"
	@echo "$(TINY)/clip.mp4     streamed by the student; its weights are random, it shows noise"

pocket:  ## the pocket model from nothing, through pre-training and all stages: hours on two cores

pocket-report:  ## measures of pocket/results.md; trains what it compares with: hours

pocket-ablations:  ## stage II of the pocket model with other stabilisers: hours

pocket-evaluate:  ## teacher and student beside true clips: a table, and a page with the clips

test: $(VENV)/.installed-test  ## the test suite, without the slow tests
	$(PYTEST)
	TEST_XLA=default $(PYTEST) -m "default_xla and not slow"

aot: $(VENV)/.installed-compilers  ## compile the 19B stages and the sampler for TPUs and GPUs: hours
	$(BIN)/python -m launch.aot --all --output outputs/scaling.json

test-slow: $(VENV)/.installed-test $(VENV)/.installed-compilers  ## the slow tests only
	$(PYTEST) -m slow

lint: $(BIN)/ruff  ## style and formatting, changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(BIN)/ruff  ## fix what lint finds, where it can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## time the streaming loop of the tiny model on this machine
	$(BIN)/python -m benchmarks.stream --size tiny --height 128 --width 128 --output outputs/bench

clean:  ## remove .venv, caches, the demo and make tiny's; other outputs stay
	rm -rf $(VENV) $(DEMO) $(TINY) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted install is taken up again by the next run.
$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit( \
		f"$(PYTHON) is Python {v[0]}.{v[1]}, but 3.11 or newer is needed: make PYTHON=...")'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: setup.py $(VENV)/.created
	@echo "installing omniforcing_jax into $(VENV) (about a minute)"
	@$(PIP) install --use-pep517 --editable .
	@touch $@

# Compilers for TPUs and GPUs that are not here; the CUDA plugin needs no CUDA for that.
$(VENV)/.installed-compilers: setup.py $(VENV)/.installed
	@$(PIP) install --use-pep517 --editable '.[tpu]'
	@version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') \
		&& $(PIP) install --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	@touch $@

$(VENV)/.installed-train: setup.py $(VENV)/.installed
	@$(PIP) install --use-pep517 --editable '.[train]'
	@touch $@

$(VENV)/.installed-demo: setup.py $(VENV)/.installed
	@$(PIP) install --use-pep517 --editable '.[pocket]'
	@touch $@

$(VENV)/.installed-serve: setup.py $(VENV)/.installed
	@$(PIP) install --use-pep517 --editable '.[serve]'
	@touch $@

$(VENV)/.installed-pocket: setup.py $(VENV)/.installed-train $(VENV)/.installed-demo
	@touch $@

# torch first: diffusers and transformers would otherwise choose which build to draw in.
$(VENV)/.installed-test: setup.py $(VENV)/.installed
	@echo "installing the test dependencies into $(VENV) (a few minutes)"
	@$(PIP) install $(TORCH)
	@$(PIP) install --use-pep517 --editable '.[test]'
	@touch $@

$(BIN)/ruff: | $(VENV)/.created
	@$(PIP) install "ruff>=0.12"

include pocket/pocket.mk
