//! A disk that fails when it is told to, for tests; only debug builds have it. The changes that a thread
//! makes through [`disk`](super::disk) are counted from 0, and the plan names one of them:
//! `enospc@7`, `eio@7`, `short@7` (a half is written, then the disk is full) or `dead@7` (an error
//! there and at every later one). A process takes its plan from `TUNESMITH_FAULT`.

use std::{cell::RefCell, fs::File, io, path::Path};

/// The variable that holds a process's plan.
pub const VARIABLE: &str = "TUNESMITH_FAULT";
/// The system's numbers for "no space left on device" and "input/output error".
const ENOSPC: i32 = 28;
const EIO: i32 = 5;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    Broken,
    Short,
    Dead,
}

#[derive(Default)]
struct Plan {
    fault: Option<(Kind, usize)>,
    /// Changes so far.
    count: usize,
    /// The first change that failed.
    hit: Option<String>,
}

thread_local! {
    static PLAN: RefCell<Plan> = RefCell::new(Plan {
        fault: std::env::var(VARIABLE).ok().as_deref().and_then(parse),
        ..Plan::default()
    });
}

/// Makes `text` the plan of this thread and counts from 0. Returns whether it is one.
pub fn arm(text: &str) -> bool {
    let fault = parse(text);
    PLAN.set(Plan { fault, ..Plan::default() });
    fault.is_some()
}

/// Ends this thread's plan. Returns the change that it made fail, if it came to that.
pub fn disarm() -> Option<String> {
    PLAN.take().hit
}

fn parse(text: &str) -> Option<(Kind, usize)> {
    let (kind, at) = text.split_once('@')?;
    let kind = match kind {
        "enospc" => Kind::Full,
        "eio" => Kind::Broken,
        "short" => Kind::Short,
        "dead" => Kind::Dead,
        _ => return None,
    };
    Some((kind, at.parse().ok()?))
}

/// Does `act`, or fails. `length`: of the file before, where bytes are added to it.
pub(super) fn act(
    operation: &'static str,
    path: &Path,
    length: Option<u64>,
    act: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let due = PLAN.with_borrow_mut(|plan| {
        let number = plan.count;
        plan.count += 1;
        let (kind, at) = plan.fault?;
        let due = number == at || (kind == Kind::Dead && number > at);
        if due && plan.hit.is_none() {
            tracing::warn!("fault at change {number}: {operation} {}", path.display());
            plan.hit = Some(format!("{operation} {}", path.display()));
        }
        due.then_some(kind)
    });
    let Some(kind) = due else { return act() };
    if let (Kind::Short, Some(before)) = (kind, length) {
        act()?;
        let file = File::options().write(true).open(path)?;
        let after = file.metadata()?.len();
        file.set_len(before + (after - before) / 2)?;
    }
    Err(io::Error::from_raw_os_error(match kind {
        Kind::Full | Kind::Short => ENOSPC,
        Kind::Broken | Kind::Dead => EIO,
    }))
}
