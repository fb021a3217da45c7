//! Memory between two parts of a program that both need much.

/// Gives back to the system what was freed inside this process. Training leaves hundreds of megabytes of
/// freed activations behind; without this, the memory of whatever comes next is added to them.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches free memory only, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
