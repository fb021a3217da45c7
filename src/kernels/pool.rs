//! Threads that wait for work awake: between the operations of a step there are a few microseconds, and
//! waking a sleeping thread takes longer than many an operation.
//!
//! One job at a time: the caller opens it and takes tasks itself, and whoever of the others is awake helps.
//! Nobody is waited for who has not begun, so a thread that the system holds up holds up nobody. A caller
//! who finds the pool at work, or is itself a task of it, does its job alone.

use std::{
    any::Any,
    cell::UnsafeCell,
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

/// A thread without work stays awake so long; pauses between the operations of a step are shorter.
const AWAKE: Duration = Duration::from_micros(200);
/// Looks for work between two offers to let others run.
const LOOKS: usize = 64;

/// Calls `body(task)` for each of `0..count`, on up to `threads` threads, of which the caller is one.
pub(super) fn for_each_task(threads: usize, count: usize, body: impl Fn(usize) + Sync) {
    static POOL: OnceLock<&Pool> = OnceLock::new();
    let helpers = threads.min(count).saturating_sub(1);
    if helpers == 0 {
        return (0..count).for_each(body);
    }
    let pool = POOL.get_or_init(|| Pool::start(threads - 1));
    if pool.is_busy.swap(true, SeqCst) {
        return (0..count).for_each(body);
    }
    pool.run(helpers, count, &body);
}

/// What the threads of the pool share.
struct Pool {
    /// Somebody's job is done, or prepared.
    is_busy: AtomicBool,
    /// Odd while a job is open.
    epoch: AtomicUsize,
    /// Helpers that have signed in: they may be reading `job`.
    signed_in: AtomicUsize,
    job: UnsafeCell<Job>,
    next_task: AtomicUsize,
    /// The first panic of a helper.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    is_asleep: Vec<AtomicBool>,
    threads: OnceLock<Vec<Thread>>,
}

#[derive(Clone, Copy)]
struct Job {
    /// Valid while the job is open, and after that while helpers are signed in.
    body: *const (dyn Fn(usize) + Sync),
    count: usize,
    helpers: usize,
}

// SAFETY: `job` is written only by who set `is_busy`, while no job is open and none is read; it is read by
// helpers only, who sign in first, and then see that the job is still open. All of that is sequentially
// consistent, so either such a helper sees that the job is closed, or who closes it sees the helper.
unsafe impl Sync for Pool {}
// SAFETY: as above.
unsafe impl Send for Pool {}

impl Pool {
    /// Threads that live as long as the program; fewer where the system gives no more.
    fn start(helpers: usize) -> &'static Self {
        let pool: &Self = Box::leak(Box::new(Self {
            is_busy: AtomicBool::new(false),
            epoch: AtomicUsize::new(0),
            signed_in: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { body: &|_| {}, count: 0, helpers: 0 }),
            next_task: AtomicUsize::new(0),
            panic: Mutex::new(None),
            is_asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            threads: OnceLock::new(),
        }));
        let spawn = |index: usize| {
            let builder = thread::Builder::new().name(format!("kernels-{index}"));
            builder.spawn(move || pool.help(index)).ok().map(|handle| handle.thread().clone())
        };
        pool.threads.get_or_init(|| (0..helpers).map_while(spawn).collect());
        pool
    }

    /// The caller has set `is_busy`.
    fn run(&self, helpers: usize, count: usize, body: &(dyn Fn(usize) + Sync)) {
        let body: *const (dyn Fn(usize) + Sync + '_) = body;
        // SAFETY: only the lifetime changes, and this function returns after the last use.
        let body: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(body) };
        // SAFETY: no job is open, and the last one's helpers have signed out.
        unsafe { *self.job.get() = Job { body, count, helpers } };
        self.next_task.store(0, SeqCst);
        self.epoch.fetch_add(1, SeqCst);
        let threads = self.threads.get().map_or(&[][..], Vec::as_slice);
        for (thread, is_asleep) in threads.iter().zip(&self.is_asleep).take(helpers) {
            if is_asleep.swap(false, SeqCst) {
                thread.unpark();
            }
        }
        // SAFETY: the body is borrowed for the whole call.
        let own = catch_unwind(AssertUnwindSafe(|| unsafe { self.work(count, body) }));
        self.epoch.fetch_add(1, SeqCst);
        while self.signed_in.load(SeqCst) > 0 {
            look_around(|| self.signed_in.load(SeqCst) == 0);
        }
        let other = self.panic.lock().ok().and_then(|mut panic| panic.take());
        self.is_busy.store(false, SeqCst);
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    /// Takes tasks until there are none left.
    ///
    /// # Safety
    /// `body` is valid.
    unsafe fn work(&self, count: usize, body: *const (dyn Fn(usize) + Sync)) {
        loop {
            let task = self.next_task.fetch_add(1, SeqCst);
            if task >= count {
                return;
            }
            // SAFETY: by contract.
            unsafe { (*body)(task) };
        }
    }

    /// The life of a helper.
    fn help(&self, index: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait_for_job(index, seen);
            self.signed_in.fetch_add(1, SeqCst);
            if self.epoch.load(SeqCst) == seen {
                // SAFETY: this helper signed in while the job was open, so it stays until it signs out.
                let Job { body, count, helpers } = unsafe { *self.job.get() };
                if index < helpers {
                    // SAFETY: as above.
                    let work = AssertUnwindSafe(|| unsafe { self.work(count, body) });
                    if let (Err(panic), Ok(mut first)) = (catch_unwind(work), self.panic.lock()) {
                        first.get_or_insert(panic);
                    }
                }
            }
            self.signed_in.fetch_sub(1, SeqCst);
        }
    }

    /// Waits, at first awake, for an open job other than the one `seen` last.
    fn wait_for_job(&self, index: usize, seen: usize) -> usize {
        let open =
            || Some(self.epoch.load(SeqCst)).filter(|epoch| epoch % 2 == 1 && *epoch != seen);
        let mut since = Instant::now();
        loop {
            look_around(|| open().is_some());
            if let Some(epoch) = open() {
                return epoch;
            }
            if since.elapsed() > AWAKE {
                self.is_asleep[index].store(true, SeqCst);
                // Who opens a job now sees that this thread sleeps, or this thread sees the job.
                if open().is_none() {
                    thread::park();
                }
                self.is_asleep[index].store(false, SeqCst);
                since = Instant::now();
            }
        }
    }
}

/// Looks for something for about a microsecond, then lets others run.
pub(super) fn look_around(is_there: impl Fn() -> bool) {
    for _ in 0..LOOKS {
        if is_there() {
            return;
        }
        spin_loop();
    }
    thread::yield_now();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may")]
    use super::*;

    #[test]
    fn every_task_is_done_once_whoever_calls_and_however_often() {
        thread::scope(|scope| {
            for caller in 0..3 {
                scope.spawn(move || {
                    for count in 0..200 {
                        let done: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                        for_each_task(3, count, |task| {
                            // A task may have tasks.
                            for_each_task(3, 2, |_| {
                                done[task].fetch_add(1, SeqCst);
                            });
                        });
                        let wrong = done.iter().filter(|done| done.load(SeqCst) != 2).count();
                        assert_eq!(wrong, 0, "caller {caller}, {count} tasks");
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_works_on() {
        for bad in 0..20 {
            let run = || for_each_task(2, 20, |task| assert_ne!(task, bad, "bad task"));
            assert!(catch_unwind(run).is_err());
        }
        let sum = AtomicUsize::new(0);
        for_each_task(2, 100, |task| {
            sum.fetch_add(task, SeqCst);
        });
        assert_eq!(sum.load(SeqCst), 4950);
    }

    #[test]
    fn a_thread_that_fell_asleep_is_woken() {
        // Each task waits until both have begun, so two threads have to come, unless another test has the
        // pool: then one does both, and it is tried again.
        let come_together = || {
            let (begun, waited) = (AtomicUsize::new(0), AtomicBool::new(false));
            for_each_task(2, 2, |_| {
                let start = Instant::now();
                begun.fetch_add(1, SeqCst);
                while begun.load(SeqCst) < 2 && start.elapsed() < Duration::from_millis(500) {
                    thread::yield_now();
                }
                if begun.load(SeqCst) < 2 {
                    waited.store(true, SeqCst);
                }
            });
            !waited.load(SeqCst)
        };
        thread::sleep(50 * AWAKE);
        assert!((0..20).any(|_| come_together()));
    }
}
