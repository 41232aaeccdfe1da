//! Ctrl-C and SIGTERM: what is on disk is whole at any moment, so a run ends at once, and says how it goes on.

use std::path::PathBuf;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;

use crate::ui::{note, quoted};

/// What becomes of a run that is interrupted.
pub enum After {
    /// The same command with --resume continues it.
    Resume,
    /// The same command continues it.
    Again,
    /// This directory is removed.
    Remove(PathBuf),
}

/// From now on a signal ends the process with 128 + its number (130 for Ctrl-C, 143 for SIGTERM), as shells have it, and with a line that says how to
/// continue.
pub fn explain(after: After) {
    // Without the handler a signal ends the process just as well, in silence.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else { return };
    std::thread::spawn(move || {
        let Some(signal) = signals.forever().next() else { return };
        if let After::Remove(path) = &after {
            let _ = std::fs::remove_dir_all(path);
            note!("\ninterrupted; nothing is left");
            low_level::exit(128 + signal);
        }
        let mut command: Vec<String> =
            std::env::args_os().map(|arg| quoted(&arg.to_string_lossy())).collect();
        if matches!(after, After::Resume) && !command.iter().any(|arg| arg == "--resume") {
            command.push("--resume".to_owned());
        }
        note!("\ninterrupted; what is finished is kept. To continue:\n  {}", command.join(" "));
        low_level::exit(128 + signal);
    });
}
