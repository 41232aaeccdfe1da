# Everything a newcomer or CI runs. `make help` lists the targets.

FETCH := scripts/fetch-model.sh
TEXTS := ../shared/data/wikitext2
TASKS := ../shared/data/tasks

# What soak feeds damaged files for, and fuzz, in all.
MINUTES := 60
KILLS := 100
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
# What Miri interprets in minutes: packers and unpackers, scalar products, quantizers of activations and of the cache, transforms, attention.
MIRI_TESTS := parallel::tests::chunks parallel::tests::a_panic weights:: isa:: error:: matmul::tests::empty matmul::tests::levels matmul::tests::names acts::tests::special acts::tests::equals kv::tests::degenerate \
	branch::tests::pack branch::tests::inputs dense::tests::empty hadamard::tests::nothing hadamard::tests::transforms hadamard::tests::across fft:: dct::tests::equals \
	reflections:: kronecker::tests::equals kronecker::tests::the_inverse kronecker::tests::a_singular attention::tests::matches_f64_in_every_shape attention::tests::twins

.DEFAULT_GOAL := help
.PHONY: help demo reproduction build model test arm soak fuzz sanitize deny lint fmt docs

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

test: model lint ## Formatting, clippy, tests, documentation: with `make arm` all that CI runs.
	SPECQUANT_SMOLLM2="$$($(FETCH))" cargo test --workspace
	cargo test -p specquant-eval --features hub --test parquet
	$(MAKE) docs

arm: ## The kernels' tests for AArch64 in an emulator: rustup target add aarch64-unknown-linux-musl, and Debian's qemu-user-static.
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER=rust-lld CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUNNER=qemu-aarch64-static \
		cargo test -p specquant-kernels --lib --target aarch64-unknown-linux-musl

soak: build ## Damaged files for MINUTES (60), whose finds go to target/soak; checkpoints with a turned bit; KILLS (100) kills; memory against layers.
	cargo run --release -p specquant-fuzz -- soak $$(($(MINUTES) * 60)) target/soak
	SPECQUANT_BITS=7 cargo test --release -p specquant-fuzz --test bits
	SPECQUANT_KILLS=$(KILLS) cargo test --release -p specquant-cli --test kills
	TEXT=$(TEXTS)/wiki.valid.raw scripts/memory.sh

fuzz: ## The same targets under libFuzzer and AddressSanitizer for MINUTES (60) in all: nightly compiler, cargo install cargo-fuzz.
	cargo run --release -p specquant-fuzz -- seeds fuzz/corpus
	for target in $$(cargo +nightly fuzz list); do \
		cargo +nightly fuzz run $$target -- -max_total_time=$$(($(MINUTES) * 60 / 7)) -max_len=200000 -timeout=20 || exit 1; \
	done

sanitize: ## The kernels' tests under AddressSanitizer, and packers and scalar kernels under Miri: nightly compiler with miri and rust-src.
	RUSTFLAGS=-Zsanitizer=address cargo +nightly test --release -p specquant-kernels --lib --target $(HOST) --target-dir target/asan
	MIRIFLAGS="-Zmiri-tree-borrows -Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-permissive-provenance" PROPTEST_CASES=2 RAYON_NUM_THREADS=2 \
		cargo +nightly miri test -p specquant-kernels --lib --target-dir target/miri -- $(MIRI_TESTS)

deny: ## Licences, sources and known vulnerabilities of all dependencies: cargo install cargo-deny cargo-audit.
	cargo deny check
	cargo audit

lint: ## Check formatting and lints without changing anything.
	cargo fmt --check
	cargo clippy --workspace --all-targets -- -D warnings

fmt: ## Format the code.
	cargo fmt

docs: ## Build the API documentation; a broken link is an error.
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
