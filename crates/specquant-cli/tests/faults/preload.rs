//! Preloaded into the binary (`LD_PRELOAD`), a disk that fails: `FAULT_FSYNC=N` lets the Nth flush of a file fail with EIO, `FAULT_WRITE=N` lets whatever is
//! written to files behind the first N bytes fail with ENOSPC.

use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

const EIO: c_int = 5;
const ENOSPC: c_int = 28;
/// Of dlsym: the next library that has the symbol.
const NEXT: *mut c_void = -1isize as *mut c_void;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn __errno_location() -> *mut c_int;
    fn getenv(name: *const c_char) -> *const c_char;
    fn atol(text: *const c_char) -> i64;
}

fn limit(variable: &std::ffi::CStr) -> Option<usize> {
    // SAFETY: both are strings that end in a zero, and the program does not change its environment.
    unsafe {
        let value = getenv(variable.as_ptr());
        (!value.is_null()).then(|| atol(value) as usize)
    }
}

fn fail(error: c_int) {
    // SAFETY: it is this thread's errno.
    unsafe { *__errno_location() = error };
}

fn flush(name: &std::ffi::CStr, file: c_int) -> c_int {
    static FLUSHES: AtomicUsize = AtomicUsize::new(0);
    if Some(FLUSHES.fetch_add(1, Ordering::SeqCst) + 1) == limit(c"FAULT_FSYNC") {
        fail(EIO);
        return -1;
    }
    // SAFETY: the symbol is libc's function of this type.
    unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(c_int) -> c_int>(dlsym(NEXT, name.as_ptr()))(file) }
}

#[unsafe(no_mangle)]
extern "C" fn fsync(file: c_int) -> c_int {
    flush(c"fsync", file)
}

#[unsafe(no_mangle)]
extern "C" fn fdatasync(file: c_int) -> c_int {
    flush(c"fdatasync", file)
}

#[unsafe(no_mangle)]
extern "C" fn write(file: c_int, bytes: *const c_void, count: usize) -> isize {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    if file > 2 && limit(c"FAULT_WRITE").is_some_and(|most| WRITTEN.fetch_add(count, Ordering::SeqCst) + count > most) {
        fail(ENOSPC);
        return -1;
    }
    type Write = extern "C" fn(c_int, *const c_void, usize) -> isize;
    // SAFETY: as above.
    unsafe { std::mem::transmute::<*mut c_void, Write>(dlsym(NEXT, c"write".as_ptr()))(file, bytes, count) }
}
