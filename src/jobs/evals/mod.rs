//! Evaluations by graders: definitions, runs over rows, and the worker that makes them.

mod definition;
mod records;
mod row;
mod schema;
mod source;
mod worker;

use std::collections::BTreeMap;

use serde_json::Value;

pub(super) use self::worker::work;
pub use self::{
    definition::NewEval,
    records::{
        Counts, CriterionCounts, CriterionResult, Eval, EvalOutput, EvalRun, EvalSource,
        ModelUsage, Outcome, RunStatus, SourceRow,
    },
    source::NewRun,
};
use super::{JobsError, Service, Transaction, new_id, unix_seconds};
use records::EvalTask;

impl Service {
    /// Keeps a definition.
    ///
    /// # Errors
    /// The database fails.
    pub fn create_eval(&self, new: NewEval) -> Result<Eval, JobsError> {
        let eval = new.into_record(new_id("eval_"), unix_seconds());
        self.store.write(|tx| tx.insert(&eval).map_err(JobsError::from))?;
        Ok(eval)
    }

    /// The evaluation `id`.
    ///
    /// # Errors
    /// There is none, or the database fails.
    pub fn eval(&self, id: &str) -> Result<Eval, JobsError> {
        self.store.get(id)?.ok_or_else(|| no_eval(id))
    }

    /// Changes name and metadata where they are given.
    ///
    /// # Errors
    /// There is no such evaluation, or the database fails.
    pub fn update_eval(
        &self,
        id: &str,
        name: Option<String>,
        metadata: Option<BTreeMap<String, String>>,
    ) -> Result<Eval, JobsError> {
        self.store.write(|tx| {
            let mut eval = tx.get::<Eval>(id)?.ok_or_else(|| no_eval(id))?;
            eval.name = name.or(eval.name);
            eval.metadata = metadata.or(eval.metadata);
            tx.update(&eval)?;
            Ok(eval)
        })
    }

    /// Removes an evaluation with its runs; one that is under way ends.
    ///
    /// # Errors
    /// There is none, or the database fails.
    pub fn delete_eval(&self, id: &str) -> Result<(), JobsError> {
        self.store.write(|tx| {
            if !tx.delete::<Eval>(id)? {
                return Err(no_eval(id));
            }
            for run in tx.all::<EvalRun>(id)? {
                delete_run(tx, &run.id)?;
            }
            Ok(())
        })
    }

    /// Queues a run. It is on disk when this returns.
    ///
    /// # Errors
    /// The evaluation was deleted meanwhile, or the database fails.
    pub fn create_eval_run(&self, eval: &Eval, new: NewRun) -> Result<EvalRun, JobsError> {
        let (run, source) = new.into_records(eval, new_id("evalrun_"), unix_seconds());
        self.store.write(|tx| {
            tx.get::<Eval>(&eval.id)?.ok_or_else(|| no_eval(&eval.id))?;
            tx.insert(&run)?;
            tx.insert(&source)?;
            tx.insert(&EvalTask { run_id: run.id.clone() }).map_err(JobsError::from)
        })?;
        self.bell.ring();
        Ok(run)
    }

    /// The run `id` of an evaluation.
    ///
    /// # Errors
    /// There is none, or the database fails.
    pub fn eval_run(&self, eval_id: &str, id: &str) -> Result<EvalRun, JobsError> {
        let run = self.store.get::<EvalRun>(id)?.filter(|run| run.eval_id == eval_id);
        run.ok_or_else(|| no_run(id))
    }

    /// The rows of a run, as its client gave them.
    ///
    /// # Errors
    /// The database fails.
    pub fn eval_rows(&self, run_id: &str) -> Result<Vec<SourceRow>, JobsError> {
        let source: Option<EvalSource> = self.store.get(run_id)?;
        Ok(source.map(|source| source.rows).unwrap_or_default())
    }

    /// Ends a run; what it has found so far stays.
    ///
    /// # Errors
    /// There is none, it has ended, or the database fails.
    pub fn cancel_eval_run(&self, eval_id: &str, id: &str) -> Result<EvalRun, JobsError> {
        self.store.write(|tx| {
            let run = tx.get::<EvalRun>(id)?.filter(|run| run.eval_id == eval_id);
            let mut run = run.ok_or_else(|| no_run(id))?;
            if run.status.is_final() {
                let status = run.status.name();
                return Err(JobsError::invalid(
                    "run_id",
                    format!("the run {id} has ended: its status is {status}"),
                ));
            }
            run.status = RunStatus::Canceled;
            tx.update(&run)?;
            tx.delete::<EvalTask>(id)?;
            Ok(run)
        })
    }

    /// Removes a run; one that is under way ends.
    ///
    /// # Errors
    /// There is none, or the database fails.
    pub fn delete_eval_run(&self, eval_id: &str, id: &str) -> Result<(), JobsError> {
        self.store.write(|tx| {
            let run = tx.get::<EvalRun>(id)?.filter(|run| run.eval_id == eval_id);
            run.ok_or_else(|| no_run(id))?;
            delete_run(tx, id)
        })
    }
}

fn delete_run(tx: &Transaction<'_>, id: &str) -> Result<(), JobsError> {
    tx.delete::<EvalRun>(id)?;
    tx.delete::<EvalSource>(id)?;
    tx.delete::<EvalTask>(id)?;
    for output in tx.all::<EvalOutput>(id)? {
        tx.delete::<EvalOutput>(&output.id)?;
    }
    Ok(())
}

fn no_eval(id: &str) -> JobsError {
    JobsError::NotFound { what: "eval", id: id.to_owned(), param: "eval_id" }
}

fn no_run(id: &str) -> JobsError {
    JobsError::NotFound { what: "eval run", id: id.to_owned(), param: "run_id" }
}

/// 1 to 256 characters, or nothing.
fn valid_name(value: &Value) -> Result<Option<String>, JobsError> {
    const MAX_CHARS: usize = 256;
    let name = value.as_str().filter(|name| (1..=MAX_CHARS).contains(&name.chars().count()));
    if name.is_none() && !value.is_null() {
        let message = format!("`name` must be a string of 1 to {MAX_CHARS} characters");
        return Err(JobsError::invalid("name", message));
    }
    Ok(name.map(str::to_owned))
}
