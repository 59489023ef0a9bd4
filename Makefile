# The commands a newcomer learns: `make demo` makes a video, `make test` proves that all is well.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PY := $(VENV)/bin/python
BIN := $(VENV)/bin
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

# A matching set: ComfyUI asks for all three, and mixed builds of them do not load together.
TORCH := torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0

# Tests run in a process per core; a process has one thread, and runs whole files.
WORKERS ?= 2
PYTEST := $(PY) -m pytest --durations=20 --numprocesses=$(WORKERS) --dist=loadfile

# The oldest PyAV that ComfyUI allows, and the tests of all that opens or writes media files.
AV_FLOOR := $(VENV)/av-floor
AV_TESTS := tests/core/audio/test_io.py tests/core/conditioning/test_reference.py \
  tests/core/safe_io/test_media.py tests/core/test_hdr.py tests/core/video \
  tests/training/data/test_footage.py
# PyAV 16.0 cannot make the file of the first; FFmpeg 8.0 leaves padding at the end of the second.
AV_TESTS += --deselect tests/core/audio/test_io.py::test_a_variable_rate_mp3_is_as_long_as_what_was_spoken \
  --deselect 'tests/core/audio/test_io.py::test_lossy_formats_come_back_in_time[a.mkv-aac-fltp]'

.PHONY: help demo test test-fast test-long test-av-floor lint clean espeak

help:
	@echo "make demo   make out/demo.mp4 from a shipped portrait and voice, in a real ComfyUI"
	@echo "make test   lint, types, import contracts, all tests but the long ones"
	@echo "make test-fast  for daily work: no slow tests, no ComfyUI, no lint; under two minutes"
	@echo "make test-av-floor  the tests of media files with the oldest PyAV that ComfyUI allows"
	@echo "make test-long  the long tests: whole networks compiled, hours of sound"
	@echo "make lint   style, types, docstrings and import contracts only"
	@echo "make results  measure what training made: docs/results/distillation.md, continuation.md"
	@echo "make fuzz   damaged files for every entry point that reads files, a minute each"
	@echo "make bench  where the time goes, against ComfyUI's own nodes: docs/results/performance.md"
	@echo "make bench-training  seconds and memory of a training step: docs/results/training_speed.md"
	@echo "make clean  remove what these commands made"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter; COMFYUI_PATH=/path/to/ComfyUI uses your own host."

demo: $(VENV)/.run-ready
	$(PY) -m tools.demo

test: lint espeak test-av-floor
	$(PYTEST) --ignore=tests/nodes
	host="$$($(PY) tools/comfy/download.py)"; COMFYUI_PATH="$$host" $(PYTEST) tests/nodes

test-fast: $(VENV)/.dev-ready espeak
	$(PYTEST) --ignore=tests/nodes -m "not slow and not long"

test-long: $(VENV)/.dev-ready espeak
	$(PYTEST) --ignore=tests/nodes -m long
	host="$$($(PY) tools/comfy/download.py)"; COMFYUI_PATH="$$host" $(PYTEST) tests/nodes -m long

test-av-floor: $(AV_FLOOR)/.made
	PYTHONPATH=$(AV_FLOOR) $(PY) -c "import av; assert av.__version__.startswith('16.0'), av.__version__"
	PYTHONPATH=$(AV_FLOOR) $(PYTEST) $(AV_TESTS)

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --level warning --pythonpath $(PY)
	$(BIN)/pydoclint --quiet turbotalk_core training
	$(BIN)/lint-imports
	$(BIN)/codespell

# --- the embedded models, each from its seed (docs/training.md); the last two take hours ----------

.PHONY: models-audio-encoder models-vae models-data models-teacher models-student

AUDIO_ENCODER := models/audio_encoders/turbotalk_tiny_wav2vec2.safetensors
VAE := models/vae/turbotalk_tiny_vae.safetensors

models-audio-encoder: $(VENV)/.run-ready espeak
	$(PY) -m training.tiny.audio_encoder --out $(AUDIO_ENCODER) --num-steps 800 --threads 1

models-vae: $(VENV)/.run-ready espeak
	$(PY) -m training.tiny.vae --compile --out runs/vae.safetensors
	$(PY) -m training.tiny.vae --compile --init runs/vae.safetensors --decoder-noise 0.25 \
	  --motion-weight 8 --image-steps 0 --clip-steps 1200 --learning-rate 1e-3 --clips 200 --out $(VAE)

# What teacher and student learn from.
models-data: $(VENV)/.dev-ready espeak
	printf '0\n1\n' | xargs -P 2 -I{} $(PY) -m training.data precompute --out runs/prepared \
	  --vae $(VAE) --encoder $(AUDIO_ENCODER) --avatars 480 --pairs 64 --frames 81 \
	  --threads 1 --part {} --parts 2

models-teacher: models-data
	$(PY) -m training.train tiny_teacher
	cp runs/tiny_teacher/exports/teacher/diffusion_models/teacher.safetensors \
	  models/diffusion_models/turbotalk_tiny_teacher.safetensors
	cp runs/tiny_teacher/exports/teacher/model_patches/teacher_adapter.safetensors \
	  models/model_patches/turbotalk_tiny_adapter.safetensors

models-student: models-data
	$(PY) -m training.train tiny
	$(PY) -m training.train tiny_continuation
	cp runs/tiny_continuation/exports/continuation/diffusion_models/student.safetensors \
	  models/diffusion_models/turbotalk_tiny.safetensors
	cp runs/tiny_continuation/exports/continuation/model_patches/student_adapter.safetensors \
	  models/model_patches/turbotalk_tiny_student_adapter.safetensors
	cp runs/tiny/exports/dmd/diffusion_models/student.safetensors \
	  models/diffusion_models/turbotalk_tiny_dmd.safetensors
	cp runs/tiny/exports/dmd/model_patches/student_adapter.safetensors \
	  models/model_patches/turbotalk_tiny_dmd_adapter.safetensors

# --- hostile files: a minute for each entry point (docs/security.md); `FUZZ=3600` takes an hour ---------

.PHONY: fuzz

FUZZ ?= 60
ENTRY_POINTS ?= request box prompts model pickle index tokenizer picture sound video take journal chunk_state \
  chunk take_sound

fuzz: $(VENV)/.dev-ready
	$(PIP) --editable '.[fuzz]'
	@mkdir -p out/fuzz; failed=0; for entry in $(ENTRY_POINTS); do \
	  $(PY) -m tests.fuzz "$$entry" --seconds $(FUZZ) > "out/fuzz/$$entry.log" 2>&1 || failed=1; \
	  echo "$$entry:"; grep -E 'number_of_executed_units|peak_rss|SUMMARY|ERROR|Exception' \
	    "out/fuzz/$$entry.log"; \
	done; exit $$failed

# --- the evidence: measures what the runs made, and makes docs/results ----------------------------

.PHONY: results

results: $(VENV)/.dev-ready espeak
	$(PY) -m training.reports.results training/studies/distillation.yaml
	$(PY) -m training.reports.results training/studies/continuation.yaml

# --- what training costs: minutes, on a machine that does nothing else ----------------------------

.PHONY: bench

bench: $(VENV)/.dev-ready
	$(PY) -m tools.benchmark.run --json docs/results/performance.json \
	  --markdown docs/results/performance.md

.PHONY: bench-training

bench-training: $(VENV)/.dev-ready
	$(PY) -m training.benchmark --json docs/results/training_speed.json \
	  --markdown docs/results/training_speed.md

# ----------------------------------------------------------------------------------------------

clean:
	rm -rf $(VENV) .host build dist out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Only the tests that make speech need it; nothing that a user runs does.
espeak:
	@command -v espeak-ng >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	     && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq espeak-ng >/dev/null; } \
	|| if [ -n "$${CI:-}" ]; then \
	     echo "espeak-ng is missing and could not be installed; CI skips no test" >&2; exit 1; \
	   else \
	     echo "espeak-ng is missing: what makes speech will be skipped or fail"; \
	   fi

# --- environment: stamp files, so that a warm run starts at once ----------------------------------

$(VENV)/.made:
	@SECONDS=0; rm -rf $(VENV); \
	for python in $${PYTHON:-python3.11 python3.12 python3.13 python3.10}; do \
	  if "$$python" -c "import ensurepip, venv" 2>/dev/null; then break; else python=; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "no Python 3.10 to 3.13 with the venv module found; install one or name it: make PYTHON=…" >&2; \
	  exit 1; \
	fi; \
	"$$python" -m venv $(VENV); touch $@; \
	echo "environment: $$("$$python" --version) in $${SECONDS} s"

# All that ComfyUI and the pack need to run.
$(VENV)/.run-ready: $(VENV)/.made requirements.txt tools/comfy/download.py
	@SECONDS=0; echo "environment: installing what ComfyUI and TurboTalk need, some minutes the first time"; \
	host="$$($(PY) tools/comfy/download.py)"; \
	$(PIP) $(TORCH) -r "$$host/requirements.txt" -r requirements.txt; touch $@; \
	echo "environment: ComfyUI's and TurboTalk's requirements in $${SECONDS} s"

$(AV_FLOOR)/.made: $(VENV)/.dev-ready
	$(PIP) --no-deps --upgrade --target $(AV_FLOOR) 'av==16.0.*'; touch $@

# What checks it, too.
$(VENV)/.dev-ready: $(VENV)/.run-ready pyproject.toml
	@SECONDS=0; $(PIP) --editable '.[dev,metrics,train]'; touch $@; \
	echo "environment: development tools in $${SECONDS} s"
