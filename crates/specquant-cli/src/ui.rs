//! Progress: a bar on a terminal, plain lines elsewhere; and tables.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A line on stderr. Unlike `eprintln!` it does not mind when nobody reads: `specquant ... 2>&1 | head`.
macro_rules! note {
    ($($line:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}
pub(crate) use note;

/// Progress over a known number of steps, on stderr.
pub struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    total: u64,
    /// Steps that an earlier run has done.
    skipped: u64,
    started: Instant,
    last_line: Instant,
    quiet: bool,
}

/// Without a terminal, a line at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// Starts at zero. `quiet` shows nothing.
    pub fn new(what: &'static str, total: u64, quiet: bool) -> Self {
        let bar = (stderr().is_terminal() && !quiet).then(|| {
            let style =
                ProgressStyle::with_template("{prefix:>12} [{bar:30}] {pos}/{len} {elapsed} eta {eta} {msg}");
            ProgressBar::new(total)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_prefix(what)
        });
        let now = Instant::now();
        Progress { bar, what, total, skipped: 0, started: now, last_line: now, quiet }
    }

    /// `done` steps need not be done: an earlier run did them.
    pub fn skip(&mut self, done: u64) {
        (self.skipped, self.started) = (done, Instant::now());
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.reset_eta();
        }
    }

    /// `done` steps are done; `message` is the latest news.
    pub fn set(&mut self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if !self.quiet && (self.last_line.elapsed() >= LINE_EVERY || done == self.total) {
            self.line(done, message);
        }
    }

    /// As [`Progress::set`], but a log gets its line in any case.
    pub fn step(&mut self, done: u64, message: &str) {
        match self.bar {
            Some(_) => self.set(done, message),
            None if self.quiet => {}
            None => self.line(done, message),
        }
    }

    fn line(&mut self, done: u64, message: &str) {
        let elapsed = self.started.elapsed().as_secs_f64();
        let fresh = done.saturating_sub(self.skipped).max(1);
        let eta = elapsed / fresh as f64 * self.total.saturating_sub(done) as f64;
        let _ =
            writeln!(stderr(), "{} {done}/{} {elapsed:.0}s eta {eta:.0}s {message}", self.what, self.total);
        self.last_line = Instant::now();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A word as a shell reads it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./=,:+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// The command line, of every path the last part, which is what matters to another reader.
pub fn command() -> String {
    let last = |path: &str| path.rsplit('/').find(|part| !part.is_empty()).unwrap_or("/").to_owned();
    let word = |arg: std::ffi::OsString| {
        let arg = arg.to_string_lossy().into_owned();
        let (flag, value) = match arg.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (format!("{flag}="), value.to_owned()),
            _ if arg.starts_with("-o") && arg.len() > 2 => ("-o ".to_owned(), arg[2..].to_owned()),
            _ => (String::new(), arg),
        };
        let value = value.split(',').map(last).collect::<Vec<_>>().join(",");
        let value = if value.contains(char::is_whitespace) { format!("'{value}'") } else { value };
        flag + &value
    };
    std::env::args_os().map(word).collect::<Vec<_>>().join(" ")
}

/// Columns as wide as their widest cell; the first is left-aligned, the others right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().enumerate().map(|(c, cell)| {
            let w = widths[c];
            if c == 0 { format!("{cell:<w$}") } else { format!("{cell:>w$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// All that is wrong with what was asked for, to be said at once.
#[derive(Default)]
pub struct Wrong(Vec<String>);

impl Wrong {
    /// What was looked at, if nothing is wrong with it.
    pub fn of<T>(&mut self, looked_at: Result<T, impl Into<anyhow::Error>>) -> Option<T> {
        looked_at.map_err(|error| self.say(format!("{:#}", error.into()))).ok()
    }

    /// Something is wrong. Several runs may stumble over one file, which is said once.
    pub fn say(&mut self, what: String) {
        if !self.0.contains(&what) {
            self.0.push(what);
        }
    }

    pub fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    pub fn into_error(self) -> anyhow::Error {
        anyhow::anyhow!(self.0.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn tables_align() {
        let rows = [vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(super::table(&rows), "a    bb\nccc   d\n");
    }
}
