//! Memory for weights: zeroed, at the border of a cache line, and, where there is much of it, in huge pages.
//!
//! A matrix of some megabytes is read from its first byte to its last for every token. In pages of 4 KiB that
//! costs a look-up in the page table for each; and the memory of a model is filled by all threads at once,
//! which is a matter of page faults. Both are hundreds of times fewer with pages of 2 MiB.

use std::{
    ptr::NonNull,
    slice,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a huge page; less is not worth a mapping of its own.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a mapping that is shared: it lives as long as anything in it.
const SHARED: usize = 2 * HUGE_PAGE;
/// Less than that is left to the allocator.
const MIN_SHARED: usize = 2 << 10;

/// A cache line: panels begin and end at its borders.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Zeroed bytes that start at a line's border.
pub(super) struct Lines(Memory);

enum Memory {
    Few(Vec<Line>),
    Mapped(Mapping),
    /// So many bytes from there on, which are nobody else's.
    Part(Arc<Mapping>, usize, usize),
}

/// The mapping that is being given away, and how much of it is gone.
static CURRENT: Mutex<Option<(Arc<Mapping>, usize)>> = Mutex::new(None);

impl Lines {
    pub(super) fn zeroed(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(LINE);
        let memory = match bytes {
            0..MIN_SHARED => None,
            MIN_SHARED..HUGE_PAGE => part(bytes),
            _ => Mapping::new(bytes).map(Memory::Mapped),
        };
        Self(memory.unwrap_or_else(|| Memory::Few(vec![Line([0; LINE]); bytes / LINE])))
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
            // SAFETY: the part lies within the mapping, which it keeps alive.
            Memory::Part(mapping, start, bytes) => unsafe {
                slice::from_raw_parts(mapping.start.as_ptr().add(*start), *bytes)
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
            // SAFETY: as above; no two parts overlap, and the borrow of this one is exclusive.
            Memory::Part(mapping, start, bytes) => unsafe {
                slice::from_raw_parts_mut(mapping.start.as_ptr().add(*start), *bytes)
            },
        }
    }
}

/// A part of a mapping that is shared. Nothing is given away twice, so it is still zero.
fn part(bytes: usize) -> Option<Memory> {
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let room = |(mapping, used): &(Arc<Mapping>, usize)| used + bytes <= mapping.bytes;
    if !current.as_ref().is_some_and(room) {
        // A little more, so that it can begin where a huge page does. What nobody writes to takes no memory.
        let mapping = Mapping::new(SHARED + HUGE_PAGE)?;
        let before = mapping.start.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
        *current = Some((Arc::new(mapping), before));
    }
    let (mapping, used) = current.as_mut()?;
    let start = *used;
    *used += bytes;
    Some(Memory::Part(Arc::clone(mapping), start, bytes))
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
        for bytes in [0, 1, 64, 4097, 4097, 1 << 20, HUGE_PAGE - 1, HUGE_PAGE, 5 * HUGE_PAGE + 65] {
            let mut lines = Lines::zeroed(bytes);
            assert_eq!(lines.bytes().len(), bytes.next_multiple_of(64));
            assert_eq!(lines.as_ptr() as usize % 64, 0);
            assert!(lines.bytes().iter().all(|byte| *byte == 0));
            lines.bytes_mut().fill(7);
            assert!(lines.bytes().iter().all(|byte| *byte == 7));
        }
    }
}
