//! SIGUSR1 as a flag that it turns on and off.

use std::sync::{Arc, atomic::AtomicBool};

/// A flag that every SIGUSR1 turns over. Where there is no such signal it stays false.
///
/// # Errors
/// No thread or no signal handler can be had.
pub(super) fn pause_on_signal() -> anyhow::Result<Arc<AtomicBool>> {
    let pause = Arc::new(AtomicBool::new(false));
    #[cfg(unix)]
    {
        use std::sync::atomic::Ordering;
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let flag = Arc::clone(&pause);
        // The handler is in place before this returns: without it the signal would end the process.
        let mut signals = runtime.block_on(async { signal(SignalKind::user_defined1()) })?;
        std::thread::Builder::new().name("pause".to_owned()).spawn(move || {
            while runtime.block_on(signals.recv()).is_some() {
                flag.fetch_xor(true, Ordering::Relaxed);
            }
        })?;
    }
    Ok(pause)
}
