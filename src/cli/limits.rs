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
    }
    Ok(())
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
