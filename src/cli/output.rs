//! What commands print. The macros of the standard library panic when nobody reads any more, as in
//! `tunesmith train | head`; the ones here, which stand in for them in this floor, do not: whoever prints
//! goes on with its work, and `main` hears at the end whether anything was lost.

use std::{
    fmt,
    io::{self, Write},
    sync::OnceLock,
};

macro_rules! print {
    ($($text:tt)+) => { $crate::cli::output::out(format_args!($($text)+)) };
}
macro_rules! println {
    () => { $crate::cli::output::out(format_args!("\n")) };
    ($($text:tt)+) => { $crate::cli::output::out(format_args!("{}\n", format_args!($($text)+))) };
}
macro_rules! eprintln {
    ($($text:tt)+) => { $crate::cli::output::err(format_args!($($text)+)) };
}

/// The first error of the standard output: of a process there is one, as there is one output.
static LOST: OnceLock<(io::ErrorKind, String)> = OnceLock::new();

/// Writes to the standard output.
pub(super) fn out(text: fmt::Arguments<'_>) {
    // `Stdout` keeps its errors.
    let _ = Stdout(io::stdout()).write_fmt(text);
}

/// Writes a line to the standard error stream. Where that is gone, there is nobody to tell.
pub(super) fn err(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Whether the standard output has failed: nobody reads it, or it is a file on a full disk.
pub(super) fn is_lost() -> bool {
    LOST.get().is_some()
}

/// Why what was printed did not arrive. That its reader has gone is no fault.
pub(super) fn fault() -> Option<&'static str> {
    let (kind, reason) = LOST.get()?;
    (*kind != io::ErrorKind::BrokenPipe).then_some(reason)
}

/// The standard output, which takes whatever it is given.
pub(super) struct Stdout(pub(super) io::Stdout);

impl Stdout {
    fn forgive<T>(result: io::Result<T>, instead: T) -> io::Result<T> {
        match result {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                LOST.get_or_init(|| (error.kind(), error.to_string()));
                Ok(instead)
            }
            result => result,
        }
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::forgive(self.0.write(bytes), bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Self::forgive(self.0.flush(), ())
    }
}
