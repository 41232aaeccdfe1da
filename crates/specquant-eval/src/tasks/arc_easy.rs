//! ARC-Easy: school science. lm-eval `arc/arc_easy.yaml`.

use super::{Dataset, Document, Fields, Metric, Task};

pub(super) const TASK: Task = Task {
    name: "arc_easy",
    version: 1.0,
    file: "arc_easy",
    dataset: Dataset { path: "allenai/ai2_arc", config: "ARC-Easy", split: "test" },
    metric: Metric::Choice { norm: true },
    parse,
};

pub(super) fn parse(row: &Fields) -> Result<Document, String> {
    let context = format!("Question: {}\nAnswer:", row.text("question")?);
    let (choices, gold) = row.labelled_choices()?;
    Document::choices(&context, &choices, gold)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{parse, strings};
    use super::TASK;
    use serde_json::json;

    #[test]
    fn prompt_with_letters_and_digits() {
        for (labels, key) in [(["A", "B", "C"], "C"), (["1", "2", "3"], "3")] {
            let row = json!({"question": "H₂O?", "choices": {"text": ["air", "earth", "water"], "label": labels}, "answerKey": key});
            let (contexts, continuations, gold) = strings(&TASK, row);
            assert_eq!(contexts, ["Question: H₂O?\nAnswer:"; 3]);
            assert_eq!((continuations[1].as_str(), gold), (" earth", 2));
        }
        let row =
            json!({"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "1"});
        assert!(parse(&TASK, row).unwrap_err().contains("answerKey"));
        let row = json!({"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"});
        assert!(parse(&TASK, row).unwrap_err().contains("labels"));
    }
}
