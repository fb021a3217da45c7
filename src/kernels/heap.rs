//! The program's memory: the system's allocator, but for large blocks.
//!
//! Each operation of a step makes tensors of megabytes, and a moment later they are let go. An allocator that
//! gives such memory back to the system gets it anew for the next operation, a page fault and a page of zeros
//! for each 4 KiB: a tenth of a prompt's time. Large blocks therefore come from one range of addresses, in huge
//! pages, and what is freed is kept for the next, up to a bound. The first place that is large enough is taken,
//! so the range is as long as what is used at once and little more.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeMap,
    ptr::null_mut,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Bytes from which on a block is large; what malloc would map by itself.
const LARGE: usize = 128 << 10;
/// Large blocks begin and end at borders of pages.
const PAGE: usize = 4 << 10;
/// Addresses that are asked for; half of it, and so on, where the system refuses.
const RESERVED: usize = 1 << 40;
/// Less is not worth it: all is left to the system.
const MIN_RESERVED: usize = 1 << 32;
/// Freed bytes that are kept unless somebody says otherwise.
const KEPT: usize = 256 << 20;

/// Memory of the whole program.
#[global_allocator]
static HEAP: Heap = Heap::new();

/// The system's allocator, and large blocks.
struct Heap {
    large: Mutex<Large>,
    /// The addresses of large blocks; 0: not yet, or not to be had.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Freed bytes that may be kept.
    limit: AtomicUsize,
}

/// Addresses from `start` to `end`; those below `top` have been given away.
struct Large {
    start: usize,
    top: usize,
    end: usize,
    is_refused: bool,
    /// What is free below `top`: length by start; no two touch.
    free: BTreeMap<usize, usize>,
    /// Bytes that were freed and neither taken nor given back since.
    kept: usize,
}

impl Heap {
    const fn new() -> Self {
        Self {
            large: Mutex::new(Large {
                start: 0,
                top: 0,
                end: 0,
                is_refused: false,
                free: BTreeMap::new(),
                kept: 0,
            }),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            limit: AtomicUsize::new(KEPT),
        }
    }

    /// What is locked here allocates small blocks only, which never come back to this lock.
    fn large(&self) -> MutexGuard<'_, Large> {
        self.large.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_large(layout: Layout) -> bool {
        layout.size() >= LARGE && layout.align() <= PAGE
    }

    /// Whether a large block begins there. Who holds one has got it after these were set.
    fn has(&self, block: *mut u8) -> bool {
        (self.start.load(Relaxed)..self.end.load(Relaxed)).contains(&block.addr())
    }

    /// A block, and how many of its first bytes may not be zero.
    fn take(&self, bytes: usize) -> Option<(*mut u8, usize)> {
        let mut large = self.large();
        if !large.reserve() {
            return None;
        }
        self.start.store(large.start, Relaxed);
        self.end.store(large.end, Relaxed);
        large.take(bytes.checked_next_multiple_of(PAGE)?)
    }

    fn give(&self, block: *mut u8, bytes: usize) {
        let mut large = self.large();
        large.give(block.addr(), bytes.next_multiple_of(PAGE));
        if large.kept > self.limit.load(Relaxed) {
            large.release();
        }
    }
}

// SAFETY: blocks are the system's, or parts of the reserved range that nobody else has: `Large` gives no address
// away twice before it is given back.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if Self::is_large(layout)
            && let Some((block, _)) = self.take(layout.size())
        {
            return block;
        }
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if Self::is_large(layout)
            && let Some((block, used)) = self.take(layout.size())
        {
            // SAFETY: the block has at least so many bytes.
            unsafe { block.write_bytes(0, used.min(layout.size())) };
            return block;
        }
        // SAFETY: the caller's layout.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if Self::is_large(layout) && self.has(block) {
            return self.give(block, layout.size());
        }
        // SAFETY: not one of ours, so it came from the system with this layout.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's alignment and size.
        let wanted = unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) };
        if !Self::is_large(layout) && !Self::is_large(wanted) {
            // SAFETY: a small block came from the system.
            return unsafe { System.realloc(block, layout, bytes) };
        }
        if Self::is_large(layout)
            && Self::is_large(wanted)
            && self.has(block)
            && self.large().resize(
                block.addr(),
                layout.size().next_multiple_of(PAGE),
                bytes.next_multiple_of(PAGE),
            )
        {
            return block;
        }
        // SAFETY: a new block of the wanted layout, the old one's, and as many bytes as both have.
        unsafe {
            let new = self.alloc(wanted);
            if !new.is_null() {
                new.copy_from_nonoverlapping(block, layout.size().min(bytes));
                self.dealloc(block, layout);
            }
            new
        }
    }
}

impl Large {
    /// Asks for the range of addresses at the first call; false where there is none.
    fn reserve(&mut self) -> bool {
        let mut bytes = RESERVED;
        while self.start == 0 && !self.is_refused {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a new mapping at no particular place touches nobody's memory.
            let start = unsafe { libc::mmap(null_mut(), bytes, access, kind, -1, 0) };
            if start == libc::MAP_FAILED {
                bytes /= 2;
                self.is_refused = bytes < MIN_RESERVED;
                continue;
            }
            // SAFETY: the range is the mapping's own. It is only a wish; whatever comes back, the pages serve.
            #[cfg(target_os = "linux")]
            unsafe {
                libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
            }
            self.start = start.expose_provenance();
            (self.top, self.end) = (self.start, self.start + bytes);
        }
        self.start != 0
    }

    fn take(&mut self, bytes: usize) -> Option<(*mut u8, usize)> {
        let fits = self.free.iter().find(|(_, length)| **length >= bytes);
        let (start, used) = if let Some((&start, &length)) = fits {
            self.free.remove(&start);
            if length > bytes {
                self.free.insert(start + bytes, length - bytes);
            }
            (start, bytes)
        } else {
            // What is free right below the top grows beyond it.
            let last = self.free.last_key_value().map(|(start, length)| (*start, *length));
            let last = last.filter(|(start, length)| start + length == self.top);
            let (start, used) = last.unwrap_or((self.top, 0));
            if bytes > self.end - start {
                return None;
            }
            self.free.remove(&start);
            self.top = start + bytes;
            (start, used)
        };
        self.kept = self.kept.saturating_sub(used);
        Some((std::ptr::with_exposed_provenance_mut(start), used))
    }

    fn give(&mut self, mut start: usize, mut bytes: usize) {
        self.kept += bytes;
        if let Some(after) = self.free.remove(&(start + bytes)) {
            bytes += after;
        }
        if let Some((&before, &length)) = self.free.range(..start).next_back()
            && before + length == start
        {
            (start, bytes) = (before, bytes + length);
        }
        self.free.insert(start, bytes);
    }

    /// Changes a block's length where it is; false where the place behind it is taken.
    fn resize(&mut self, start: usize, bytes: usize, wanted: usize) -> bool {
        let (end, wanted_end) = (start + bytes, start + wanted);
        if wanted < bytes {
            self.give(wanted_end, bytes - wanted);
            return true;
        }
        let behind = self.free.get(&end).copied().unwrap_or(0);
        let is_last = end + behind == self.top;
        if wanted_end > if is_last { self.end } else { end + behind } {
            return false;
        }
        self.free.remove(&end);
        if end + behind > wanted_end {
            self.free.insert(wanted_end, end + behind - wanted_end);
        }
        self.top = self.top.max(wanted_end);
        self.kept = self.kept.saturating_sub(behind.min(wanted - bytes));
        true
    }

    /// Gives back to the system what is free.
    fn release(&mut self) {
        self.kept = 0;
        #[cfg(target_os = "linux")]
        {
            for (start, bytes) in &self.free {
                let start = std::ptr::with_exposed_provenance_mut(*start);
                // SAFETY: nobody uses this part of the mapping; it reads as zeros from here on.
                unsafe { libc::madvise(start, *bytes, libc::MADV_DONTNEED) };
            }
            if let Some((&start, &bytes)) = self.free.last_key_value()
                && start + bytes == self.top
            {
                self.free.remove(&start);
                self.top = start;
            }
        }
    }
}

/// Gives back to the system what was freed inside this process. Training leaves hundreds of megabytes of
/// freed activations behind; without this, the memory of whatever comes next is added to them.
pub fn release_freed_memory() {
    HEAP.large().release();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: touches free memory only, and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// From here on all that is freed is kept for what comes next, until [`release_freed_memory`]: for a process that
/// needs as much again and again, as each step of a training does.
pub fn keep_freed_memory() {
    HEAP.limit.store(usize::MAX, Relaxed);
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a number of malloc, under its lock, and may be called at any time.
    unsafe {
        // Small blocks, too; -1: never.
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// `count` numbers of any value, for whoever writes each of them before reading it.
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

/// A type whose zero is zero bytes.
pub trait Zero: Copy {}
impl Zero for f32 {}
impl Zero for half::bf16 {}
impl Zero for u8 {}

/// Zeros that take memory as they are written to, page by page, and not before.
#[must_use]
pub fn sparse_zeros<T: Zero>(count: usize) -> Vec<T> {
    let Ok(layout) = Layout::array::<T>(count) else { return Vec::new() };
    if layout.size() == 0 {
        return Vec::new();
    }
    // SAFETY: the layout is not empty. The block is the system's, which `dealloc` sees, and holds `count` zeros.
    unsafe {
        let block = System.alloc_zeroed(layout).cast::<T>();
        if block.is_null() {
            std::alloc::handle_alloc_error(layout);
        }
        Vec::from_raw_parts(block, count, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a block is filled with.
    fn check(block: &[u8], value: u8) {
        assert!(block.iter().all(|byte| *byte == value), "somebody else wrote to this block");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn blocks_keep_what_is_written_to_them_and_zeros_are_zeros(
            steps in prop::collection::vec((0..5_usize, 0..8_usize, 1_usize..40), 1..60),
            limit in prop::sample::select(vec![0, 1 << 20, usize::MAX]),
        ) {
            // Its own range of addresses, so that the program's is not in the way.
            let heap: &Heap = Box::leak(Box::new(Heap::new()));
            heap.limit.store(limit, Relaxed);
            let mut blocks: Vec<Option<(*mut u8, Layout, u8)>> = vec![None; 8];
            for (value, (what, at, size)) in (1_u8..).zip(steps) {
                let layout = Layout::from_size_align(size * 30_000, 64).unwrap();
                let slice = |block: *mut u8, bytes| {
                    // SAFETY: a block of so many bytes that nobody else has.
                    unsafe { std::slice::from_raw_parts_mut(block, bytes) }
                };
                let old = blocks[at].take();
                if let Some((block, old, value)) = old {
                    check(slice(block, old.size()), value);
                }
                // SAFETY: blocks are used with their layouts.
                let new = unsafe {
                    match (old, what) {
                        (Some((block, old, value)), 0 | 1) => {
                            let block = heap.realloc(block, old, layout.size());
                            check(slice(block, old.size().min(layout.size())), value);
                            Some(block)
                        }
                        (Some((block, old, _)), _) => {
                            heap.dealloc(block, old);
                            None
                        }
                        (None, 0..3) => {
                            let block = heap.alloc_zeroed(layout);
                            check(slice(block, layout.size()), 0);
                            Some(block)
                        }
                        (None, _) => Some(heap.alloc(layout)),
                    }
                };
                blocks[at] = new.map(|block| {
                    slice(block, layout.size()).fill(value);
                    (block, layout, value)
                });
            }
            let large = heap.large();
            let free: usize = large.free.values().sum();
            let size = |(_, layout, _): &(*mut u8, Layout, u8)| layout.size();
            let held = blocks.iter().flatten().map(size).filter(|bytes| *bytes >= LARGE);
            let held: usize = held.map(|bytes| bytes.next_multiple_of(PAGE)).sum();
            prop_assert_eq!(large.top - large.start, held + free);
        }
    }

    #[test]
    fn what_was_freed_is_taken_again() {
        let first = vec![1_u8; 3 << 20];
        let heap = Heap::new();
        let layout = Layout::from_size_align(3 << 20, 8).unwrap();
        // SAFETY: blocks are used with their layout.
        unsafe {
            let block = heap.alloc(layout);
            heap.dealloc(block, layout);
            assert_eq!(heap.alloc(layout), block);
        }
        assert!(HEAP.has(first.as_ptr().cast_mut()));
        assert!(!HEAP.has(sparse_zeros::<u8>(3 << 20).as_mut_ptr()));
    }
}
