//! OpenBookQA: elementary science, the sentence's end to be chosen. lm-eval `openbookqa/openbookqa.yaml`.

use super::{Dataset, Document, Fields, Metric, Task};

pub(super) const TASK: Task = Task {
    name: "openbookqa",
    version: 1.0,
    file: "openbookqa",
    dataset: Dataset { path: "allenai/openbookqa", config: "main", split: "test" },
    metric: Metric::Choice { norm: true },
    parse,
};

fn parse(row: &Fields) -> Result<Document, String> {
    let (choices, gold) = row.labelled_choices()?;
    Document::choices(row.text("question_stem")?, &choices, gold)
}

#[cfg(test)]
mod tests {
    use super::super::tests::strings;
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt() {
        let row = json!({"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": " B"});
        let (contexts, continuations, gold) = strings(&TASK, row);
        assert_eq!(contexts, ["Ice is"; 2]);
        assert_eq!((continuations, gold), (vec![" hot".to_owned(), " cold".to_owned()], 1));
    }
}
