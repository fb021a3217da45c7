//! Several micro-batches at once: on small models one micro-batch cannot keep two cores busy.

use std::{sync::mpsc, thread};

use super::TrainError;

/// Threads that each work on whole micro-batches.
pub(super) struct Workers {
    /// One thread each, so that the operations inside a micro-batch do not spread again.
    pools: Vec<rayon::ThreadPool>,
}

impl Workers {
    /// `count` threads; below two, everything runs on the caller's.
    pub(super) fn new(count: usize) -> Result<Self, TrainError> {
        let pool = |_| rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let pools = if count < 2 { Ok(Vec::new()) } else { (0..count).map(pool).collect() };
        Ok(Self { pools: pools.map_err(std::io::Error::other)? })
    }

    /// Calls `work` on every item and hands the results to `take` on this thread, in the order of
    /// the items, whatever their number or the threads': what is summed there is the same bits
    /// everywhere. Ends at the first error.
    pub(super) fn in_order<T: Sync, R: Send>(
        &self,
        items: &[T],
        work: impl Fn(usize, &T) -> Result<R, TrainError> + Sync,
        mut take: impl FnMut(R) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let count = self.pools.len();
        if count < 2 || items.len() < count {
            let mut items = items.iter().enumerate();
            return items.try_for_each(|(index, item)| take(work(index, item)?));
        }
        let work = &work;
        thread::scope(|scope| {
            let mut receivers = Vec::with_capacity(count);
            for (first, pool) in self.pools.iter().enumerate() {
                // A worker is at most one result ahead, which bounds the memory.
                let (sender, receiver) = mpsc::sync_channel(1);
                receivers.push(receiver);
                let mut own = (first..items.len()).step_by(count);
                // It ends when nobody takes its results any more.
                let run = move || own.all(|index| sender.send(work(index, &items[index])).is_ok());
                scope.spawn(move || pool.install(run));
            }
            for index in 0..items.len() {
                let result = receivers[index % count].recv();
                // A worker that panicked sends nothing; the scope passes its panic on.
                let Ok(result) = result else { break };
                take(result?)?;
            }
            Ok(())
        })
    }
}
