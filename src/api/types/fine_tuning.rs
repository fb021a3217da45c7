//! Bodies of `/v1/fine_tuning`: a job's request, jobs, events, checkpoints and their lists.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::api::azure_form::AzureForm;
use crate::jobs::{Auto, Checkpoint, EventLevel, Gate, Hyperparameters, Job, JobEvent, Method};

/// Every field is optional here, so that a missing one is reported by name.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CreateJobRequest {
    pub(crate) model: Option<String>,
    pub(crate) training_file: Option<String>,
    pub(crate) validation_file: Option<String>,
    pub(crate) suffix: Option<String>,
    pub(crate) seed: Option<i64>,
    pub(crate) method: Option<Map<String, Value>>,
    pub(crate) hyperparameters: Option<Map<String, Value>>,
    pub(crate) integrations: Option<Vec<Value>>,
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    // Ours: where the new model is to appear, and under which condition.
    pub(crate) alias: Option<String>,
    pub(crate) gate: Option<Value>,
    /// Azure's; there is one kind of training here.
    #[serde(rename = "trainingType")]
    pub(crate) _training_type: Option<String>,
    #[serde(flatten)]
    pub(crate) unknown: Map<String, Value>,
}

#[derive(Debug, Serialize)]
pub(crate) struct JobObject {
    pub(crate) object: &'static str,
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) created_at: u64,
    pub(crate) finished_at: Option<u64>,
    pub(crate) fine_tuned_model: Option<String>,
    pub(crate) organization_id: String,
    pub(crate) result_files: Vec<String>,
    pub(crate) status: &'static str,
    pub(crate) validation_file: Option<String>,
    pub(crate) training_file: String,
    /// Null unless the method is supervised.
    pub(crate) hyperparameters: Option<HyperparametersObject>,
    pub(crate) trained_tokens: Option<u64>,
    pub(crate) integrations: Vec<Value>,
    pub(crate) seed: u64,
    pub(crate) estimated_finish: Option<u64>,
    pub(crate) error: Option<JobErrorObject>,
    pub(crate) user_provided_suffix: Option<String>,
    pub(crate) usage_metrics: Option<Value>,
    pub(crate) shared_with_openai: bool,
    pub(crate) metadata: Option<BTreeMap<String, String>>,
    pub(crate) method: MethodObject,
    // Ours, where there is something to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) alias: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gate: Option<Gate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) evaluation: Option<Value>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct HyperparametersObject {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) beta: Option<Value>,
    pub(crate) batch_size: Value,
    pub(crate) learning_rate_multiplier: Value,
    pub(crate) n_epochs: Value,
}

impl HyperparametersObject {
    /// In Azure's form "auto" is -1, and the factor on the learning rate 1.
    fn new(given: Hyperparameters, form: Option<AzureForm>) -> Self {
        fn shown<T: Into<Value>>(value: Auto<T>, form: Option<AzureForm>, auto: i32) -> Value {
            match (value, form) {
                (Auto::Value(value), _) => value.into(),
                (Auto::Auto, Some(AzureForm)) => auto.into(),
                (Auto::Auto, None) => "auto".into(),
            }
        }
        Self {
            beta: given.beta.map(|beta| shown(beta, form, -1)),
            batch_size: shown(given.batch_size, form, -1),
            learning_rate_multiplier: shown(given.learning_rate_multiplier, form, 1),
            n_epochs: shown(given.n_epochs, form, -1),
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct MethodObject {
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) supervised: Option<MethodSettings>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) dpo: Option<MethodSettings>,
}

#[derive(Debug, Serialize)]
pub(crate) struct MethodSettings {
    pub(crate) hyperparameters: HyperparametersObject,
}

#[derive(Debug, Serialize)]
pub(crate) struct JobErrorObject {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
}

impl JobObject {
    pub(crate) fn new(job: Job, organization: &str, form: Option<AzureForm>) -> Self {
        let hyperparameters = HyperparametersObject::new(job.hyperparameters, form);
        let settings = |method| {
            let hyperparameters = hyperparameters.clone();
            (job.method == method).then_some(MethodSettings { hyperparameters })
        };
        let method = MethodObject {
            kind: job.method.name(),
            supervised: settings(Method::Supervised),
            dpo: settings(Method::Dpo),
        };
        let is_supervised = job.method == Method::Supervised;
        Self {
            object: "fine_tuning.job",
            id: job.id,
            model: job.model,
            created_at: job.created_at,
            finished_at: job.finished_at,
            fine_tuned_model: job.fine_tuned_model,
            organization_id: organization.to_owned(),
            result_files: job.result_files,
            status: job.status.name(),
            validation_file: job.validation_file,
            training_file: job.training_file,
            hyperparameters: is_supervised.then_some(hyperparameters),
            trained_tokens: job.trained_tokens,
            integrations: job.integrations,
            seed: job.seed,
            estimated_finish: job.estimated_finish,
            error: job.error.map(|error| JobErrorObject {
                code: error.code,
                message: error.message,
                param: error.param,
            }),
            user_provided_suffix: job.suffix,
            usage_metrics: None,
            shared_with_openai: false,
            metadata: job.metadata,
            method,
            alias: job.alias,
            gate: job.gate,
            evaluation: job.evaluation,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct EventObject {
    pub(crate) object: &'static str,
    pub(crate) id: String,
    pub(crate) created_at: u64,
    pub(crate) level: EventLevel,
    pub(crate) message: String,
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) data: Value,
}

impl From<JobEvent> for EventObject {
    fn from(event: JobEvent) -> Self {
        Self {
            object: "fine_tuning.job.event",
            id: event.id,
            created_at: event.created_at,
            level: event.level,
            message: event.message,
            kind: if event.is_metrics { "metrics" } else { "message" },
            data: event.data,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct CheckpointObject {
    pub(crate) object: &'static str,
    pub(crate) id: String,
    pub(crate) created_at: u64,
    pub(crate) fine_tuned_model_checkpoint: String,
    pub(crate) fine_tuning_job_id: String,
    pub(crate) metrics: Value,
    pub(crate) step_number: u64,
}

impl From<Checkpoint> for CheckpointObject {
    fn from(checkpoint: Checkpoint) -> Self {
        Self {
            object: "fine_tuning.job.checkpoint",
            id: checkpoint.id,
            created_at: checkpoint.created_at,
            fine_tuned_model_checkpoint: checkpoint.model,
            fine_tuning_job_id: checkpoint.job_id,
            metrics: checkpoint.metrics,
            step_number: checkpoint.step,
        }
    }
}

/// A page of objects.
#[derive(Debug, Serialize)]
pub(crate) struct ListObject<T> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<T>,
    pub(crate) has_more: bool,
}

/// A page that also names its ends.
#[derive(Debug, Serialize)]
pub(crate) struct EndedListObject<T> {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<T>,
    pub(crate) first_id: Option<String>,
    pub(crate) last_id: Option<String>,
    pub(crate) has_more: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct CreatePermissionsRequest {
    pub(crate) project_ids: Option<Vec<String>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct PermissionObject {
    pub(crate) object: &'static str,
    pub(crate) id: String,
    pub(crate) created_at: u64,
    pub(crate) project_id: String,
}
