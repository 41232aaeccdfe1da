//! Small charts as inline SVG. Colours and fonts come from the page's style sheet: classes `s0`, `s1` … are the series, `grid`, `chance`,
//! `label` and `axis` the rest. All are drawn 440 units wide, so that they stay legible on a telephone.

use std::fmt::Write;

const WIDTH: f64 = 440.0;

/// A scale from the smallest to the largest of some values, a little widened.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    lo: f64,
    hi: f64,
    log: bool,
}

impl Axis {
    /// `values` that are not finite, or not positive on a logarithmic scale, are left out.
    pub fn around(values: impl Iterator<Item = f64>, log: bool) -> Axis {
        let usable = values.filter(|v| v.is_finite() && (!log || *v > 0.0));
        let scale = |v: f64| if log { v.log10() } else { v };
        let (lo, hi) =
            usable.map(scale).fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), v| (lo.min(v), hi.max(v)));
        let (lo, hi) = if lo > hi { (0.0, 1.0) } else { (lo, hi) };
        let margin = if hi > lo { 0.06 * (hi - lo) } else { 0.5 };
        Axis { lo: lo - margin, hi: hi + margin, log }
    }

    fn place(&self, value: f64, from: f64, to: f64) -> f64 {
        let v = if self.log { value.max(f64::MIN_POSITIVE).log10() } else { value };
        from + (to - from) * ((v - self.lo) / (self.hi - self.lo)).clamp(0.0, 1.0)
    }

    /// Three to eight round numbers.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = self.lo.floor() as i32..=self.hi.ceil() as i32;
            let digits: &[f64] = match self.hi - self.lo {
                s if s < 1.3 => &[1.0, 2.0, 3.0, 5.0],
                s if s < 2.5 => &[1.0, 3.0],
                _ => &[1.0],
            };
            let all = decades.flat_map(|e| digits.iter().map(move |d| d * 10f64.powi(e)));
            let inside: Vec<f64> = all.filter(|t| (self.lo..=self.hi).contains(&t.log10())).collect();
            if inside.len() >= 2 {
                return inside;
            }
            // Less than an octave: as on a linear scale.
            let linear = Axis { lo: 10f64.powf(self.lo), hi: 10f64.powf(self.hi), log: false };
            return linear.ticks();
        }
        let rough = (self.hi - self.lo) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step =
            [1.0, 2.0, 5.0, 10.0].map(|d| d * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
        let first = (self.lo / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|t| *t <= self.hi).collect()
    }
}

/// A number in as few characters as tell it.
pub fn short(v: f64) -> String {
    let digits = match v.abs() {
        a if a >= 100.0 || v == v.trunc() => 0,
        a if a >= 10.0 => 1,
        a if a >= 1.0 => 2,
        a if a >= 0.01 => 3,
        _ => return format!("{v:.1e}").replace(".0e", "e"),
    };
    let text = format!("{v:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Text that is safe in HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Style of a series: eight colours, full and then hollow.
pub fn class(series: usize) -> String {
    format!("s{}{}", series % 8, if series / 8 % 2 == 1 { " hollow" } else { "" })
}

/// A value with its error bar.
pub struct Mark {
    /// Number of the series.
    pub series: usize,
    /// The value.
    pub value: f64,
    /// Ends of the error bar.
    pub bar: (f64, f64),
    /// Shown when pointed at.
    pub title: String,
}

/// A line of a dot chart.
pub struct Row {
    /// Left of it.
    pub label: String,
    /// Its values.
    pub marks: Vec<Mark>,
    /// A reference value, drawn as a tick across the line.
    pub chance: Option<f64>,
    /// Written at the right end.
    pub note: String,
}

struct Canvas {
    body: String,
}

impl Canvas {
    fn text(&mut self, class: &str, anchor: &str, x: f64, y: f64, text: &str) {
        let text = escape(text);
        let _ = write!(
            self.body,
            r#"<text class="{class}" text-anchor="{anchor}" x="{x:.1}" y="{y:.1}">{text}</text>"#
        );
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = write!(
            self.body,
            r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#
        );
    }

    fn dot(&mut self, series: usize, x: f64, y: f64, title: &str) {
        let (title, class) = (escape(title), class(series));
        let _ = write!(
            self.body,
            r#"<circle class="dot {class}" cx="{x:.1}" cy="{y:.1}" r="4.2"><title>{title}</title></circle>"#
        );
    }

    fn finish(self, height: f64, name: &str) -> Chart {
        Chart { body: self.body, height, name: escape(name) }
    }
}

/// Colours and fonts of the charts.
pub const STYLE: &str = include_str!("svg.css");

/// A drawn chart.
pub struct Chart {
    body: String,
    height: f64,
    name: String,
}

impl Chart {
    /// For a page that has [`STYLE`].
    pub fn inline(&self) -> String {
        let Chart { body, height, name } = self;
        format!(r#"<svg viewBox="0 0 {WIDTH} {height:.0}" role="img" aria-label="{name}">{body}</svg>"#)
    }

    /// As a file of its own, with a legend of the series below.
    pub fn standalone(&self, legend: &[&str]) -> String {
        let Chart { body, name, .. } = self;
        let mut canvas = Canvas { body: String::new() };
        let (mut x, mut y) = (10.0, self.height + 6.0);
        for (i, label) in legend.iter().enumerate() {
            let width = 26.0 + 6.8 * label.chars().count() as f64;
            if x + width > WIDTH && x > 10.0 {
                (x, y) = (10.0, y + 18.0);
            }
            canvas.dot(i, x, y, label);
            canvas.text("label", "start", x + 9.0, y + 4.0, label);
            x += width;
        }
        let height = if legend.is_empty() { self.height } else { y + 14.0 };
        let (legend, scale) = (canvas.body, 1.5);
        format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" width="{:.0}" role="img" aria-label="{name}"><style>{STYLE}</style><rect width="100%" height="100%" style="fill:var(--card)"/>{body}{legend}</svg>
"#,
            scale * WIDTH
        )
    }
}

/// Vertical grid lines with their numbers below, between `left` and `right`.
fn x_axis(canvas: &mut Canvas, axis: &Axis, left: f64, right: f64, top: f64, bottom: f64, title: &str) {
    for tick in axis.ticks() {
        let x = axis.place(tick, left, right);
        canvas.line("grid", (x, top), (x, bottom));
        canvas.text("axis", "middle", x, bottom + 15.0, &short(tick));
    }
    canvas.text("axis", "middle", f64::midpoint(left, right), bottom + 33.0, title);
}

/// One line a row, values to the right.
pub fn dots(rows: &[Row], axis: &Axis, title: &str, name: &str) -> Chart {
    let widest = |f: fn(&Row) -> &str| rows.iter().map(|r| f(r).chars().count()).max().unwrap_or(0) as f64;
    let left = (8.0 + 7.9 * widest(|r| &r.label)).min(182.0);
    let right = WIDTH - 12.0 - 7.2 * widest(|r| &r.note);
    let heights: Vec<f64> = rows.iter().map(|r| (11.0 * r.marks.len() as f64 + 8.0).max(26.0)).collect();
    let bottom = 6.0 + heights.iter().sum::<f64>();
    let mut canvas = Canvas { body: String::new() };
    x_axis(&mut canvas, axis, left, right, 6.0, bottom, title);
    let mut top = 6.0;
    for (row, height) in rows.iter().zip(&heights) {
        let middle = top + height / 2.0;
        canvas.text("label", "end", left - 8.0, middle + 4.0, &cut(&row.label, 22));
        canvas.text("label", "end", WIDTH - 2.0, middle + 4.0, &row.note);
        if let Some(chance) = row.chance {
            let x = axis.place(chance, left, right);
            canvas.line("chance", (x, top + 2.0), (x, top + height - 2.0));
        }
        for (i, mark) in row.marks.iter().enumerate() {
            let y = middle + 11.0 * (i as f64 - (row.marks.len() as f64 - 1.0) / 2.0);
            let [lo, value, hi] = [mark.bar.0, mark.value, mark.bar.1].map(|v| axis.place(v, left, right));
            canvas.line(&format!("bar {}", class(mark.series)), (lo, y), (hi, y));
            canvas.dot(mark.series, value, y, &mark.title);
        }
        top += height;
    }
    canvas.finish(bottom + 40.0, name)
}

/// A name of at most `most` characters.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// Points `(x, y, title)` of some series.
pub struct Series {
    /// Number of the series.
    pub series: usize,
    /// Its points.
    pub points: Vec<(f64, f64, String)>,
    /// Written beside the last point.
    pub label: String,
    /// How they are drawn.
    pub drawn: Points,
}

/// How the points of a series are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Points {
    /// Dots.
    Loose,
    /// Dots joined by lines.
    Joined,
    /// Lines alone, for many points.
    Line,
}

/// x to the right, y upwards.
pub fn plane(series: &[Series], x: &Axis, y: &Axis, titles: (&str, &str), name: &str) -> Chart {
    let (left, right, top, bottom) = (52.0, WIDTH - 14.0, 26.0, 250.0);
    let mut canvas = Canvas { body: String::new() };
    x_axis(&mut canvas, x, left, right, top, bottom, titles.0);
    for tick in y.ticks() {
        let at = y.place(tick, bottom, top);
        canvas.line("grid", (left, at), (right, at));
        canvas.text("axis", "end", left - 6.0, at + 4.0, &short(tick));
    }
    canvas.text("axis", "start", 2.0, 13.0, titles.1);
    let mut labelled: Vec<(f64, f64)> = Vec::new();
    for s in series {
        let place = |(px, py, _): &(f64, f64, String)| (x.place(*px, left, right), y.place(*py, bottom, top));
        if s.drawn != Points::Loose {
            let path: Vec<String> =
                s.points.iter().map(place).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let _ = write!(
                canvas.body,
                r#"<polyline class="path {}" points="{}"/>"#,
                class(s.series),
                path.join(" ")
            );
        }
        for point in s.points.iter().filter(|_| s.drawn != Points::Line) {
            let (px, py) = place(point);
            canvas.dot(s.series, px, py, &point.2);
        }
        if let Some((px, py)) = s.points.last().map(place).filter(|_| !s.label.is_empty()) {
            // To the left of points in the right half, so that the text stays inside.
            let (anchor, at) =
                if px > f64::midpoint(left, right) { ("end", px - 8.0) } else { ("start", px + 8.0) };
            // Where there is no other label, as near as possible; farther off it would look like another point's, and the legend must do.
            let free = |y: &f64| {
                let taken = |(lx, ly): &(f64, f64)| (lx - px).abs() < 150.0 && (ly - y).abs() < 13.0;
                (top + 8.0..bottom - 3.0).contains(y) && !labelled.iter().any(taken)
            };
            let steps = (0..4).flat_map(|i| [f64::from(i), -f64::from(i)]);
            if let Some(y) = steps.map(|step| py - 6.0 + 13.0 * step).find(free) {
                labelled.push((px, y));
                canvas.text("label", anchor, at, y, &cut(&s.label, 26));
            }
        }
    }
    canvas.finish(bottom + 40.0, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        for (values, log) in [
            ([24.1, 4440.0], true),
            ([20.0, 31.0], true),
            ([0.31, 0.69], false),
            ([110.0, 540.0], false),
            ([7.0, 7.0], false),
            ([5.0, 5.0], true),
        ] {
            let axis = Axis::around(values.into_iter(), log);
            let ticks = axis.ticks();
            assert!((2..=9).contains(&ticks.len()), "{values:?}: {ticks:?}");
            for t in ticks {
                let at = axis.place(t, 0.0, 1.0);
                assert!((0.0..=1.0).contains(&at), "{t} at {at}");
            }
        }
        let nothing = Axis::around([f64::NAN, -1.0].into_iter(), true);
        assert!(nothing.place(0.0, 0.0, 1.0).is_finite());
    }

    #[test]
    fn labels_stay_in_the_plot_and_apart() {
        let series: Vec<Series> = (0..30)
            .map(|i| Series {
                series: i,
                points: vec![(5.0, 1.0 + 0.01 * i as f64, String::new())],
                label: format!("s{i}"),
                drawn: Points::Loose,
            })
            .collect();
        let axis = Axis::around([1.0, 9.0].into_iter(), false);
        let svg = plane(&series, &axis, &axis, ("x", "y"), "n").inline();
        let labels = svg.split("class=\"label\"").skip(1);
        let mut heights: Vec<f64> = labels
            .map(|l| l.split("y=\"").nth(1).and_then(|y| y.split('"').next()?.parse().ok()).unwrap())
            .collect();
        heights.sort_by(f64::total_cmp);
        assert!((4..=7).contains(&heights.len()), "{heights:?}");
        assert!(heights[0] > 26.0 && heights[heights.len() - 1] < 250.0, "{heights:?}");
        assert!(heights.windows(2).all(|pair| pair[1] - pair[0] > 12.9), "{heights:?}");
    }

    #[test]
    fn numbers_and_markup() {
        for (v, want) in [
            (4440.7, "4441"),
            (24.146, "24.1"),
            (2.5, "2.5"),
            (0.3, "0.3"),
            (0.0, "0"),
            (0.0012, "1.2e-3"),
            (1e-5, "1e-5"),
            (100.0, "100"),
        ] {
            assert_eq!(short(v), want);
        }
        let row = Row { label: "<a & b>".into(), marks: vec![], chance: Some(1.0), note: "\"".into() };
        let chart = dots(&[row], &Axis::around([1.0].into_iter(), false), "%", "x");
        for svg in [chart.inline(), chart.standalone(&["<a"])] {
            assert!(svg.contains("&lt;a &amp; b&gt;") && !svg.contains("<a"), "{svg}");
        }
    }
}
