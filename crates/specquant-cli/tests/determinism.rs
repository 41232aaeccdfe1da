//! The same inputs write the same bytes: on one thread and two, with every instruction set, and again.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on fails")]

mod common;

use common::{Lab, QUICK, TEXT, specquant, tree};

#[test]
fn threads_instruction_sets_and_repetition_change_no_byte() {
    let lab = Lab::new();
    let model = lab.model("llama-sharded");
    let text = lab.file("text.txt", TEXT);
    // What the machine has, worst first; the binary refuses what it has not.
    let there =
        |isa: &&str| specquant().env("SPECQUANT_ISA", isa).arg("doctor").output().unwrap().status.success();
    let isas: Vec<&str> =
        ["scalar", "neondot", "avx2", "avxvnni", "avx512vnni", "amxint8"].into_iter().filter(there).collect();
    println!("{isas:?}");
    let mut differences = Vec::new();
    for recipe in ["rtn", "gptq", "specquant", "spectral", "quarot", "svdquant"] {
        let written = |case: &str, isa: &str, threads: &str| {
            let out = lab.out(&format!("{recipe}-{case}"));
            let mut command = specquant();
            command.env("SPECQUANT_ISA", isa).args(["quantize", "-m"]).arg(&model).arg("-o").arg(&out);
            command
                .args(["--recipe", recipe, "--calibration"])
                .arg(&text)
                .args(&QUICK[..6])
                .args(["--threads", threads]);
            if recipe == "spectral" {
                command.args(["--keep", "8"]);
            }
            command.assert().success();
            tree(&out)
        };
        let best = isas[isas.len() - 1];
        let first = written("first", best, "2");
        assert!(first == written("again", best, "2"), "{recipe}: two runs write different files");
        assert!(first == written("one", best, "1"), "{recipe}: 1 and 2 threads write different files");
        for isa in &isas[..isas.len() - 1] {
            let other = written(isa, isa, "2");
            let files = first.iter().zip(&other).filter(|(a, b)| a != b).map(|((name, _), _)| name.display());
            differences.extend(files.map(|name| format!("{recipe}, {best} and {isa}: {name}")));
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
}
