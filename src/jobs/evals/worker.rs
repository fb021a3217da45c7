//! The worker that makes the runs, one after the other, several rows of a run at once. What has an
//! outcome is on disk; after a restart a run goes on with the rows that have none.

use std::{
    collections::HashSet,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use super::{
    CriterionCounts, Eval, EvalOutput, EvalRun, EvalSource, ModelUsage, RunStatus,
    records::{Counts, EvalTask},
    row::Plan,
    source::Answers,
};
use crate::jobs::{JobsError, Service, ask::Asker};

/// Rows that are worked on at once: users are served at the same time.
const MAX_ROWS_AT_ONCE: usize = 8;
/// How long the worker sleeps when nobody wakes it, and after an error of the database.
const NAP: Duration = Duration::from_secs(5);
/// How long it sleeps when a run cannot go on.
const NAP_OF_THE_LAST: Duration = Duration::from_millis(200);

/// The worker.
pub(in crate::jobs) fn work(service: &Service) {
    let mut heard = 0;
    let mut last = None;
    while !service.is_stopping() {
        match next_run(service) {
            Ok(None) => service.bell.wait(&mut heard, NAP),
            // The engine has ended before the run, and soon the service will.
            Ok(task) if task == last => {
                thread::sleep(NAP_OF_THE_LAST);
                last = None;
            }
            Ok(Some(task)) => {
                last = Some(task.clone());
                if let Err(error) = run(service, &task.run_id) {
                    tracing::error!(run = task.run_id, "an evaluation run cannot go on: {error}");
                    service.bell.wait(&mut heard, NAP);
                }
            }
            Err(error) => {
                tracing::error!("evaluation runs cannot be read: {error}");
                service.bell.wait(&mut heard, NAP);
            }
        }
    }
}

/// The oldest run that has not ended.
fn next_run(service: &Service) -> Result<Option<EvalTask>, JobsError> {
    Ok(service.store.all::<EvalTask>("")?.into_iter().next())
}

/// Makes a run, or as much of it as there is time for.
fn run(service: &Service, id: &str) -> Result<(), JobsError> {
    let Some(run) = begin(service, id)? else { return Ok(()) };
    let source: Option<EvalSource> = service.store.get(id)?;
    let eval: Option<Eval> = service.store.get(&run.eval_id)?;
    // Deleted since.
    let (Some(source), Some(eval)) = (source, eval) else { return Ok(()) };
    let asker = Asker::new(service);
    let ready = Answers::parse(&run.data_source).map_err(JobsError::from).and_then(|answers| {
        let version = match &answers {
            Answers::Given => None,
            Answers::Model { model, .. } => service.version_of(model)?,
        };
        Ok((answers, version, eval.graders()?))
    });
    let (answers, version, graders) = match ready {
        Ok(ready) => ready,
        Err(error @ JobsError::Store(_)) => return Err(error),
        Err(error) => return end(service, id, RunStatus::Failed, Some(error.to_string())),
    };
    let plan = Plan { run: &run, graders, answers, version, asker };
    match all_rows(service, &plan, &source)? {
        true => end(service, id, RunStatus::Completed, None),
        false => Ok(()),
    }
}

/// Marks the run as being worked on; `None` where it has ended otherwise.
fn begin(service: &Service, id: &str) -> Result<Option<EvalRun>, JobsError> {
    service.store.write(|tx| {
        let run = tx.get::<EvalRun>(id)?.filter(|run| !run.status.is_final());
        let Some(mut run) = run else {
            tx.delete::<EvalTask>(id)?;
            return Ok(None);
        };
        run.status = RunStatus::InProgress;
        tx.update(&run)?;
        Ok(Some(run))
    })
}

fn end(
    service: &Service,
    id: &str,
    status: RunStatus,
    error: Option<String>,
) -> Result<(), JobsError> {
    service.store.write(|tx| {
        if let Some(mut run) = tx.get::<EvalRun>(id)?.filter(|run| !run.status.is_final()) {
            run.status = status;
            run.error = error.map(|message| ("run_failed".to_owned(), message));
            tx.update(&run)?;
        }
        tx.delete::<EvalTask>(id)?;
        Ok(())
    })
}

/// Works on the rows without an outcome; whether all have one afterwards. Not so where the service
/// stops, or the run is cancelled or deleted.
fn all_rows(service: &Service, plan: &Plan<'_>, source: &EvalSource) -> Result<bool, JobsError> {
    let done: HashSet<usize> = (service.store.all::<EvalOutput>(&plan.run.id)?.iter())
        .map(|output| output.index)
        .collect();
    let todo: Vec<usize> = (0..source.rows.len()).filter(|index| !done.contains(index)).collect();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let num_threads = MAX_ROWS_AT_ONCE.min(todo.len());
    let (sender, receiver) = mpsc::sync_channel(num_threads);
    let num_written = thread::scope(|scope| {
        for _ in 0..num_threads {
            let (sender, next, stop, todo) = (sender.clone(), &next, &stop, &todo);
            scope.spawn(move || {
                while !stop.load(Relaxed) && !service.is_stopping() {
                    let Some(&index) = todo.get(next.fetch_add(1, Relaxed)) else { return };
                    let Ok(output) = plan.output(index, &source.rows[index]) else { return };
                    if sender.send(output).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let written = write_all(service, &plan.run.id, &receiver);
        stop.store(true, Relaxed);
        // Whoever waits for a place in the channel is told that nobody listens any more.
        drop(receiver);
        written
    })?;
    Ok(num_written == todo.len())
}

/// Puts outcomes on record as they come, all that are there in one transaction.
fn write_all(
    service: &Service,
    run: &str,
    outputs: &mpsc::Receiver<EvalOutput>,
) -> Result<usize, JobsError> {
    let mut num_written = 0;
    while let Ok(first) = outputs.recv() {
        let batch: Vec<EvalOutput> = std::iter::once(first).chain(outputs.try_iter()).collect();
        if !write(service, run, &batch)? {
            return Ok(num_written);
        }
        num_written += batch.len();
    }
    Ok(num_written)
}

/// False where the run is to be worked on no more.
fn write(service: &Service, run: &str, batch: &[EvalOutput]) -> Result<bool, JobsError> {
    service.store.write(|tx| {
        let run = tx.get::<EvalRun>(run)?.filter(|run| run.status == RunStatus::InProgress);
        let Some(mut run) = run else { return Ok(false) };
        for output in batch {
            tx.insert(output)?;
            count(&mut run, output);
        }
        tx.update(&run)?;
        Ok(true)
    })
}

fn count(run: &mut EvalRun, output: &EvalOutput) {
    run.counts.add(output.outcome);
    for (index, result) in output.results.iter().enumerate() {
        if run.criteria.len() <= index {
            let (name, counts) = (result.name.clone(), Counts::default());
            run.criteria.push(CriterionCounts { name, counts });
        }
        run.criteria[index].counts.add(result.outcome);
    }
    for usage in &output.usage {
        let known = run.usage.iter().position(|known| known.model == usage.model);
        let known = known.unwrap_or_else(|| {
            run.usage.push(ModelUsage { model: usage.model.clone(), ..ModelUsage::default() });
            run.usage.len() - 1
        });
        let sum = &mut run.usage[known];
        sum.invocations += usage.invocations;
        sum.prompt_tokens += usage.prompt_tokens;
        sum.completion_tokens += usage.completion_tokens;
    }
}
