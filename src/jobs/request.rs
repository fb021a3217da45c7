//! From what a client asks for to a job that is on disk: the last place where his mistake is found.

use std::collections::BTreeMap;

use rand::Rng;
use serde_json::Value;

use super::{
    Auto, EventLevel, Gate, Hyperparameters, Job, JobStatus, JobsError, Method, ModelRecord,
    Service, Transaction, metadata::check_metadata, new_id, unix_seconds,
};
use crate::eval::graders;

/// What files of training rows are uploaded as.
const TRAINING_PURPOSE: &str = "fine-tune";
/// In characters.
const MAX_SUFFIX_CHARS: usize = 64;
/// Seeds are below.
const SEED_LIMIT: u64 = 1 << 31;

/// What a client asks for. The shapes are right; whether the values are is looked at here.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRequest {
    /// As the client named it.
    pub model: String,
    /// The id of the model or adapter that the job goes on from; `None`: the base.
    pub parent: Option<String>,
    /// A file's id.
    pub training_file: String,
    /// A file's id.
    pub validation_file: Option<String>,
    /// Part of the new model's name.
    pub suffix: Option<String>,
    /// `None`: a random one.
    pub seed: Option<u64>,
    /// How to train.
    pub method: Method,
    /// Given or "auto".
    pub hyperparameters: Hyperparameters,
    /// The client's own.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Echoed.
    pub integrations: Vec<Value>,
    /// The alias that is to point at the new model.
    pub alias: Option<String>,
    /// Under which condition; `None`: the operator's, where there is one.
    pub gate: Option<Gate>,
}

impl Service {
    /// Checks the request and makes the job. It is on disk when this returns, and the workers know.
    ///
    /// # Errors
    /// `Invalid` with the field that cannot be used; nothing has been stored.
    pub fn create_job(&self, request: JobRequest) -> Result<Job, JobsError> {
        check_suffix(request.suffix.as_deref())?;
        request.metadata.as_ref().map_or(Ok(()), check_metadata)?;
        if let Some(seed) = request.seed
            && seed >= SEED_LIMIT
        {
            let message = format!("`seed` must be 0 to {}, not {seed}", SEED_LIMIT - 1);
            return Err(JobsError::invalid("seed", message));
        }
        if let Some(alias) = &request.alias {
            self.check_alias_name(alias, "alias")?;
        }
        let gate = self.gate(&request)?;
        let job = new_job(request, gate);
        self.store.write(|tx| {
            check_file(tx, &job.training_file, "training_file")?;
            if let Some(file) = &job.validation_file {
                check_file(tx, file, "validation_file")?;
            }
            self.check_parent(tx, &job)?;
            tx.insert(&job)?;
            let created = format!("Created fine-tuning job: {}", job.id);
            tx.say(&job.id, EventLevel::Info, created)?;
            if !job.integrations.is_empty() {
                let message =
                    "Integrations are echoed in the job and otherwise have no effect here";
                tx.say(&job.id, EventLevel::Warn, message)?;
            }
            Ok::<_, JobsError>(())
        })?;
        tracing::info!(job = job.id, model = job.model, "fine-tuning job created");
        self.ring();
        Ok(job)
    }

    /// The condition under which the job's alias moves.
    fn gate(&self, request: &JobRequest) -> Result<Option<Gate>, JobsError> {
        let operators = self.config.gate.as_ref().filter(|_| request.alias.is_some());
        let blamed = if request.gate.is_some() { "gate" } else { "validation_file" };
        let Some(gate) = request.gate.as_ref().or(operators) else { return Ok(None) };
        if graders::position(&gate.metric).is_none() {
            let known: Vec<&str> = graders::GRADERS.iter().map(|grader| grader.name).collect();
            let known = known.join(", ");
            let message = format!("`gate.metric` must be one of {known}, not {:?}", gate.metric);
            return Err(JobsError::invalid("gate.metric", message));
        }
        if !(0.0..=1.0).contains(&gate.min_gain) {
            let message = format!("`gate.min_gain` must be 0 to 1, not {}", gate.min_gain);
            return Err(JobsError::invalid("gate.min_gain", message));
        }
        if !(gate.p_value > 0.0 && gate.p_value <= 1.0) {
            let message = format!("`gate.p_value` must be above 0, to 1, not {}", gate.p_value);
            return Err(JobsError::invalid("gate.p_value", message));
        }
        if request.validation_file.is_none() {
            let message = "the alias moves only if the tuned model beats the base on the validation \
                           file: a `validation_file` is needed";
            return Err(JobsError::invalid(blamed, message));
        }
        Ok(Some(gate.clone()))
    }

    /// A deletion may have come since the client's model was looked up.
    fn check_parent(&self, tx: &Transaction<'_>, job: &Job) -> Result<(), JobsError> {
        let Some(parent) = &job.parent_model else { return Ok(()) };
        let is_there =
            tx.get::<ModelRecord>(parent)?.is_some() || self.parts.registry.get(parent).is_some();
        if is_there { Ok(()) } else { Err(model_not_available(&job.model)) }
    }
}

/// What a client is told about a model that no job can start from.
#[must_use]
pub fn model_not_available(model: &str) -> JobsError {
    JobsError::Invalid {
        message: format!("Model {model} is not available for fine-tuning or does not exist."),
        param: "model",
        code: Some("model_not_available"),
    }
}

impl Hyperparameters {
    /// What is out of range: the field and what is wrong with it.
    ///
    /// # Errors
    /// That.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (field, value, max) in
            [("n_epochs", self.n_epochs, 50), ("batch_size", self.batch_size, 256)]
        {
            if let Auto::Value(value) = value
                && !(1..=max).contains(&value)
            {
                return Err((field, format!("must be \"auto\" or 1 to {max}, not {value}")));
            }
        }
        if let Auto::Value(value) = self.learning_rate_multiplier
            && !(value > 0.0 && value.is_finite())
        {
            let message = format!("must be \"auto\" or greater than 0, not {value}");
            return Err(("learning_rate_multiplier", message));
        }
        if let Some(Auto::Value(value)) = self.beta
            && !(value > 0.0 && value <= 2.0)
        {
            return Err(("beta", format!("must be \"auto\" or above 0, to 2, not {value}")));
        }
        Ok(())
    }
}

fn new_job(request: JobRequest, gate: Option<Gate>) -> Job {
    Job {
        id: new_id("ftjob-"),
        created_at: unix_seconds(),
        started_at: None,
        finished_at: None,
        model: request.model,
        parent_model: request.parent,
        training_file: request.training_file,
        validation_file: request.validation_file,
        suffix: request.suffix,
        seed: request.seed.unwrap_or_else(|| rand::rng().random_range(0..SEED_LIMIT)),
        method: request.method,
        hyperparameters: request.hyperparameters,
        metadata: request.metadata,
        integrations: request.integrations,
        alias: request.alias,
        gate,
        status: JobStatus::ValidatingFiles,
        request: None,
        error: None,
        fine_tuned_model: None,
        result_files: Vec::new(),
        trained_tokens: None,
        num_examples: None,
        step: 0,
        total_steps: None,
        estimated_finish: None,
        attempts: 0,
        evaluation: None,
    }
}

fn check_file(tx: &Transaction<'_>, id: &str, param: &'static str) -> Result<(), JobsError> {
    let invalid = |why: &str| {
        let code = match param {
            "training_file" => "invalid_training_file",
            _ => "invalid_validation_file",
        };
        let message = format!("invalid {param}: {id} ({why})");
        Err(JobsError::Invalid { message, param, code: Some(code) })
    };
    let file = match tx.file(id, param) {
        Err(JobsError::NotFound { .. }) => return invalid("no such file"),
        found => found?,
    };
    if file.purpose != TRAINING_PURPOSE {
        let purpose = &file.purpose;
        return invalid(&format!("its purpose is {purpose:?}, not {TRAINING_PURPOSE:?}"));
    }
    Ok(())
}

/// The suffix becomes part of a name that stands in paths and URLs.
fn check_suffix(suffix: Option<&str>) -> Result<(), JobsError> {
    let Some(suffix) = suffix else { return Ok(()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if (1..=MAX_SUFFIX_CHARS).contains(&suffix.len()) && suffix.chars().all(plain) {
        return Ok(());
    }
    let message = format!(
        "`suffix` must have 1 to {MAX_SUFFIX_CHARS} characters, letters, digits and `-_.`, not \
         {suffix:?}"
    );
    Err(JobsError::invalid("suffix", message))
}
