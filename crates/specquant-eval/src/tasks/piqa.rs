//! PIQA: which of two ways works in the physical world. lm-eval `piqa/piqa.yaml`.

use super::{Dataset, Document, Fields, Metric, Task};

pub(super) const TASK: Task = Task {
    name: "piqa",
    version: 1.0,
    file: "piqa",
    dataset: Dataset { path: "baber/piqa", config: "default", split: "validation" },
    metric: Metric::Choice { norm: true },
    parse,
};

fn parse(row: &Fields) -> Result<Document, String> {
    let context = format!("Question: {}\nAnswer:", row.text("goal")?);
    Document::choices(&context, &[row.text("sol1")?, row.text("sol2")?], row.number("label")?)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, strings};
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt() {
        let row = json!({"goal": "Open a jar", "sol1": "turn", "sol2": "sing ", "label": 0});
        let (contexts, continuations, gold) = strings(&TASK, row);
        assert_eq!(contexts, ["Question: Open a jar\nAnswer:"; 2]);
        assert_eq!((continuations, gold), (vec![" turn".to_owned(), " sing ".to_owned()], 0));
        // The hub's hidden test labels.
        let row = json!({"goal": "g", "sol1": "a", "sol2": "b", "label": -1});
        assert!(parse(&TASK, row).unwrap_err().contains("label"));
        let row = json!({"goal": "g", "sol1": "a", "sol2": "b", "label": u64::MAX});
        assert!(parse(&TASK, row).unwrap_err().contains("choice 18446744073709551615 of 2"));
    }
}
