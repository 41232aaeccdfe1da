//! BoolQ: yes or no, after a passage. lm-eval `super_glue/boolq/default.yaml`.

use super::{Dataset, Document, Fields, Metric, Task};

pub(super) const TASK: Task = Task {
    name: "boolq",
    version: 2.0,
    file: "boolq",
    dataset: Dataset { path: "aps/super_glue", config: "boolq", split: "validation" },
    metric: Metric::Choice { norm: false },
    parse,
};

fn parse(row: &Fields) -> Result<Document, String> {
    let context = format!("{}\nQuestion: {}?\nAnswer:", row.text("passage")?, row.text("question")?);
    // google/boolq says "answer": true where super_glue says "label": 1.
    let gold = row.number(if row.0.contains_key("label") { "label" } else { "answer" })?;
    Document::choices(&context, &["no", "yes"], gold)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, strings};
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt() {
        let row = json!({"question": "is it wet", "passage": "Rain — falls.", "label": 1});
        let (contexts, continuations, gold) = strings(&TASK, row);
        assert_eq!(contexts, ["Rain — falls.\nQuestion: is it wet?\nAnswer:"; 2]);
        assert_eq!((continuations, gold), (vec![" no".to_owned(), " yes".to_owned()], 1));
        assert_eq!(parse(&TASK, json!({"question": "q", "passage": "p", "answer": false})).unwrap().gold, 0);
        let bad = parse(&TASK, json!({"question": "q", "passage": "p", "label": 2})).unwrap_err();
        assert!(bad.contains("choice 3 of 2"), "{bad}");
    }
}
