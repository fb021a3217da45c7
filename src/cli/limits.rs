//! Limits that a process puts on itself at its start, so that it cannot harm its neighbours.

/// Lowers the own priority by `nice`, and bounds the memory to `memory` bytes: an allocation beyond
/// ends the process with an error. Holds for threads that are started later.
///
/// # Errors
/// The system refuses, or has no such limits.
#[cfg(unix)]
pub(super) fn apply(nice: Option<u8>, memory: Option<usize>) -> anyhow::Result<()> {
    use anyhow::Context;
    use rustix::process::{Resource, Rlimit};

    if let Some(nice) = nice {
        rustix::process::nice(i32::from(nice)).context("lowering the priority")?;
    }
    if let Some(memory) = memory {
        let limit = Some(memory as u64);
        rustix::process::setrlimit(Resource::Data, Rlimit { current: limit, maximum: limit })
            .context("limiting the memory")?;
        end_at_panics();
    }
    Ok(())
}

/// Makes a panic of any thread one line and the end of the process. Where there is no memory left a
/// backtrace fails half-way, and the failure then waits for the backtrace: for ever.
#[cfg(unix)]
fn end_at_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("a panic without a message");
        match panic.location() {
            Some(place) => eprintln!("error: {message} ({place})"),
            None => eprintln!("error: {message}"),
        }
        std::process::exit(101);
    }));
}

/// There are no such limits here.
///
/// # Errors
/// One of them was asked for.
#[cfg(not(unix))]
pub(super) fn apply(nice: Option<u8>, memory: Option<usize>) -> anyhow::Result<()> {
    anyhow::ensure!(nice.is_none() && memory.is_none(), "nice and memory limits need Unix");
    Ok(())
}
