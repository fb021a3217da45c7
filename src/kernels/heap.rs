//! What the allocator does with memory that was freed.

/// Keeps what is freed inside this process for the next buffers, until [`release_freed_memory`]. The steps of
/// a training run ask for the same hundreds of megabytes again and again; given back in between, they would
/// come back as fresh pages, each a fault and 4 KiB of zeros. Where the allocator is not glibc's nothing changes.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The most that older versions take: half of an arena's heap.
        const MODEST: libc::c_int = 32 << 20;
        // SAFETY: sets numbers of the allocator, under its lock, and may be called at any time.
        unsafe {
            if libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30) == 0 {
                libc::mallopt(libc::M_MMAP_THRESHOLD, MODEST);
            }
            // -1: never.
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        }
    }
}

/// Gives back to the system what was freed inside this process. Training leaves hundreds of megabytes of
/// freed activations behind; without this, the memory of whatever comes next is added to them.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches free memory only, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
