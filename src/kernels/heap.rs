//! What the allocator does with memory that was freed, and outputs that are not filled before they are written.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Keeps up to so many bytes of what is freed inside this process for the next buffers, until
/// [`release_freed_memory`]. Steps ask for the same tens or hundreds of megabytes again and again; given back in
/// between, they would come back as fresh pages, each a fault and 4 KiB of zeros. Who asked for the most is heard;
/// where the allocator is not glibc's nothing changes.
pub fn keep_freed_memory(bytes: usize) {
    static MOST: AtomicUsize = AtomicUsize::new(0);
    let bytes = MOST.fetch_max(bytes, Relaxed).max(bytes);
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        use libc::c_int;
        /// The most that older versions take: half of an arena's heap.
        const MODEST: c_int = 32 << 20;
        /// The length of an arena's heap: with so much beyond what is needed, an empty one stays.
        const HEAP: c_int = 64 << 20;
        // SAFETY: sets numbers of the allocator, under its lock, and may be called at any time.
        unsafe {
            if libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30) == 0 {
                libc::mallopt(libc::M_MMAP_THRESHOLD, MODEST);
            }
            libc::mallopt(libc::M_TOP_PAD, HEAP);
            // -1: never.
            libc::mallopt(libc::M_TRIM_THRESHOLD, c_int::try_from(bytes).unwrap_or(-1));
        }
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = bytes;
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

/// `count` numbers of any value, for whoever writes each of them before reading it: an output is not filled
/// twice.
#[must_use]
pub fn buffer(count: usize) -> Vec<f32> {
    let mut values = Vec::<f32>::with_capacity(count);
    // SAFETY: the vector has room for `count` elements, for which all bits are numbers; the empty instruction
    // might have written them for all that the compiler knows, so they have the values that lie there.
    unsafe {
        std::arch::asm!("/* {} */", in(reg) values.as_mut_ptr(), options(nostack, preserves_flags));
        values.set_len(count);
    }
    // Whoever reads what nobody wrote is found by its tests.
    if cfg!(debug_assertions) {
        values.fill(f32::NAN);
    }
    values
}
