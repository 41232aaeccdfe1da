# Everything a newcomer or CI runs. `make help` lists the targets.

FETCH := scripts/fetch-model.sh
TEXTS := ../shared/data/wikitext2
TASKS := ../shared/data/tasks

.DEFAULT_GOAL := help
.PHONY: help demo reproduction build model test lint fmt docs

help: ## Print this list.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: build model ## Quantize a real 135M model to 4 bits, compare it with the original, talk to both.
	target/release/specquant demo -m "$$($(FETCH))"

reproduction: build model ## Measure what docs/reproduction lacks and write it again: hours on 2 cores from nothing. TEXTS and TASKS name directories.
	target/release/specquant reproduce "$$($(FETCH))" --text $(TEXTS)/wiki.test.raw --calibration $(TEXTS)/wiki.valid.raw \
		--data $(TASKS) --limit 100 -o docs/reproduction --resume

build: ## Build the release binary, target/release/specquant.
	cargo build --release

model: ## Download the demo model into the cache (once) and print its path.
	@$(FETCH)

test: model lint ## All that CI runs: formatting, clippy, tests, documentation.
	SPECQUANT_SMOLLM2="$$($(FETCH))" cargo test --workspace
	cargo test -p specquant-eval --features hub --test parquet
	$(MAKE) docs

lint: ## Check formatting and lints without changing anything.
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: ## Format the code.
	cargo fmt

docs: ## Build the API documentation; a broken link is an error.
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
