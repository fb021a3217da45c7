//! Memory for weights: zeroed, at the border of a cache line, and, where there is much of it, in huge pages.
//!
//! A matrix of some megabytes is read from its first byte to its last for every token. In pages of 4 KiB that
//! costs a look-up in the page table for each; and the memory of a model is filled by all threads at once,
//! which is a matter of page faults. Both are hundreds of times fewer with pages of 2 MiB.

use std::{ptr::NonNull, slice};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a huge page; less is not worth a mapping of its own.
const HUGE_PAGE: usize = 2 << 20;

/// A cache line: panels begin and end at its borders.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Zeroed bytes that start at a line's border.
pub(super) struct Lines(Memory);

enum Memory {
    Few(Vec<Line>),
    Mapped(Mapping),
}

impl Lines {
    pub(super) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(LINE);
        let mapped = (bytes >= HUGE_PAGE).then(|| Mapping::new(bytes)).flatten();
        Self(
            mapped.map_or_else(|| Memory::Few(vec![Line([0; LINE]); bytes / LINE]), Memory::Mapped),
        )
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.bytes().as_ptr()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        match &self.0 {
            // SAFETY: lines are plain bytes without padding.
            Memory::Few(lines) => unsafe {
                slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * LINE)
            },
            // SAFETY: the mapping has so many readable bytes for as long as it lives.
            Memory::Mapped(mapping) => unsafe {
                slice::from_raw_parts(mapping.start.as_ptr(), mapping.bytes)
            },
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            // SAFETY: as above, and the borrow is exclusive.
            Memory::Few(lines) => unsafe {
                slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LINE)
            },
            // SAFETY: as above, and the borrow is exclusive.
            Memory::Mapped(mapping) => unsafe {
                slice::from_raw_parts_mut(mapping.start.as_ptr(), mapping.bytes)
            },
        }
    }
}

/// Private pages that no file stands behind. The kernel gives them when they are first written to.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is owned memory like a vector's, and reached only through borrows of it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `None` where the system refuses.
    fn new(bytes: usize) -> Option<Self> {
        let (access, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at no particular place touches nobody's memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        // SAFETY: the range is the mapping's own. It is only a wish; whatever comes back, the pages serve.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
        }
        Some(Self { start: NonNull::new(start.cast())?, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `mmap` with this length, and nobody borrows it any more.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_bytes_and_many_are_zero_aligned_and_written_to_alike() {
        for bytes in [0, 1, 64, 4097, HUGE_PAGE - 1, HUGE_PAGE, 5 * HUGE_PAGE + 65] {
            let mut lines = Lines::zeroed(bytes);
            assert_eq!(lines.bytes().len(), bytes.next_multiple_of(64));
            assert_eq!(lines.as_ptr() as usize % 64, 0);
            assert!(lines.bytes().iter().all(|byte| *byte == 0));
            lines.bytes_mut().fill(7);
            assert!(lines.bytes().iter().all(|byte| *byte == 7));
        }
    }
}
