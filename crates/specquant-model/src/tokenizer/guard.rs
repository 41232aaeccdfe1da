//! Calls into libraries that panic at some of what a file can say: tokenizers does where a post-processor names a token which it does not define, or
//! a decoder strips more than there is. What a file says must not end the program.

use std::any::Any;
use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local!(static GUARDED: Cell<bool> = const { Cell::new(false) });

/// What `f` returns, or its error or the message of its panic. The panic is not reported on stderr: it is the caller's error. What `f` uses must not
/// be used again after a panic unless it is left whole.
pub(super) fn guarded<T, E: Display>(f: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                others(info);
            }
        }));
    });
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    GUARDED.set(before);
    match result {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(message(&*panic).to_owned()),
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it gives no reason")
}
