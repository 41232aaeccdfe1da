//! ARC-Challenge: school science that retrieval does not solve. lm-eval `arc/arc_challenge.yaml`, whose prompt is ARC-Easy's.

use super::{Dataset, Metric, Task, arc_easy};

pub(super) const TASK: Task = Task {
    name: "arc_challenge",
    version: 1.0,
    file: "arc_challenge",
    dataset: Dataset { path: "allenai/ai2_arc", config: "ARC-Challenge", split: "test" },
    metric: Metric::Choice { norm: true },
    parse: arc_easy::parse,
};
