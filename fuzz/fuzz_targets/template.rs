#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| specquant_fuzz::run("template", bytes));
