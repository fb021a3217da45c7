//! SIGTERM, Ctrl-C and the end of the standard input as a flag.

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Sets `stop` at the first SIGTERM or Ctrl-C; the second one ends the process at once, unless it is
/// `patient`: then a parent and a supervisor may both ask, and the checkpoint is written all the same.
///
/// # Errors
/// No thread or no signal handler can be had.
pub(super) fn stop_on_signals(stop: &Arc<AtomicBool>, patient: bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stop = Arc::clone(stop);
    // The handlers are in place before this returns, so no signal is lost.
    let mut signals = runtime.block_on(async { Signals::new() })?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        loop {
            runtime.block_on(signals.next());
            if stop.swap(true, Ordering::Relaxed) && !patient {
                std::process::exit(130);
            }
        }
    })?;
    Ok(())
}

/// Sets `stop` when the standard input ends, as it does when the process that holds its other end
/// dies, however it dies.
///
/// # Errors
/// No thread can be had.
pub(super) fn stop_at_end_of_input(stop: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let stop = Arc::clone(stop);
    std::thread::Builder::new().name("leash".to_owned()).spawn(move || {
        let mut ignored = [0; 64];
        // An error means as well that nobody holds the other end.
        while std::io::stdin().read(&mut ignored).is_ok_and(|count| count > 0) {}
        stop.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let (interrupt, terminate) = (SignalKind::interrupt(), SignalKind::terminate());
        Ok(Self { interrupt: signal(interrupt)?, terminate: signal(terminate)? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        // Without a handler there is nothing to wait for.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
