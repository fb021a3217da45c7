//! From the wire form of a job's request to the service's: shapes, "auto" in its spellings, the two
//! places for hyperparameters.

use serde_json::{Map, Value};

use super::{error::ApiError, types::fine_tuning::CreateJobRequest};
use crate::jobs::{Auto, Gate, Hyperparameters, JobRequest, JobsConfig, Method};

/// What Azure's clients send for "auto".
const AZURE_AUTO: f64 = -1.0;

/// The request as the service takes it; `parent` is what its model stands for.
///
/// # Errors
/// 400 naming the field.
pub(crate) fn job_request(
    wire: CreateJobRequest,
    parent: Option<String>,
    config: &JobsConfig,
) -> Result<JobRequest, ApiError> {
    let required = |param: &str, value: Option<String>| {
        let missing = || ApiError::invalid(param, format!("`{param}` is required"));
        value.filter(|text| !text.is_empty()).ok_or_else(missing)
    };
    let (method, nested) = method_of(wire.method)?;
    let top_fields: Vec<String> =
        wire.hyperparameters.iter().flatten().map(|(field, _)| field.clone()).collect();
    let top = given("hyperparameters", wire.hyperparameters, method)?;
    let hyperparameters = merged(top, nested, method)?;
    hyperparameters.check().map_err(|(field, message)| {
        let param = if top_fields.iter().any(|top| top == field) {
            format!("hyperparameters.{field}")
        } else {
            format!("method.{}.hyperparameters.{field}", method.name())
        };
        ApiError::invalid(&param, format!("`{param}` {message}"))
    })?;
    let seed = wire.seed.map(|seed| {
        let message = || format!("`seed` must be 0 to {}, not {seed}", i32::MAX);
        u64::try_from(seed).map_err(|_| ApiError::invalid("seed", message()))
    });
    Ok(JobRequest {
        model: required("model", wire.model)?,
        parent,
        training_file: required("training_file", wire.training_file)?,
        validation_file: wire.validation_file,
        suffix: wire.suffix,
        seed: seed.transpose()?,
        method,
        hyperparameters,
        metadata: wire.metadata,
        integrations: integrations(wire.integrations.unwrap_or_default())?,
        alias: wire.alias,
        gate: gate(wire.gate, config)?,
    })
}

/// Refuses the first field that is not one of a job's.
pub(crate) fn refuse_unknown(wire: &CreateJobRequest) -> Result<(), ApiError> {
    wire.unknown.keys().next().map_or(Ok(()), |field| Err(unknown(field)))
}

fn unknown(param: &str) -> ApiError {
    ApiError::Invalid {
        message: format!("Unknown parameter: '{param}'."),
        param: Some(param.to_owned()),
        code: Some("unknown_parameter"),
    }
}

/// Hyperparameters as far as they were given.
#[derive(Debug, Default)]
struct Given {
    n_epochs: Option<Auto<u32>>,
    batch_size: Option<Auto<u32>>,
    learning_rate_multiplier: Option<Auto<f64>>,
    beta: Option<Auto<f64>>,
}

/// The method and what is set within it.
fn method_of(wire: Option<Map<String, Value>>) -> Result<(Method, Given), ApiError> {
    let Some(mut wire) = wire else { return Ok((Method::Supervised, Given::default())) };
    wire.retain(|_, value| !value.is_null());
    let kind = wire.remove("type");
    let method = match kind.as_ref().and_then(Value::as_str) {
        Some("supervised") => Method::Supervised,
        Some("dpo") => Method::Dpo,
        Some("reinforcement") => {
            return Err(ApiError::Invalid {
                message: "`method` \"reinforcement\" is not supported by this server: use \
                          \"supervised\" or \"dpo\""
                    .to_owned(),
                param: Some("method".to_owned()),
                code: Some("unsupported_value"),
            });
        }
        _ => {
            let found = kind.unwrap_or_default();
            let message = format!("`method.type` must be \"supervised\" or \"dpo\", not {found}");
            return Err(ApiError::invalid("method.type", message));
        }
    };
    let settings = wire.remove(method.name());
    if let Some(other) = wire.keys().next() {
        return Err(unknown(&format!("method.{other}")));
    }
    let path = format!("method.{}", method.name());
    let Some(mut settings) = object(&path, settings)? else {
        return Ok((method, Given::default()));
    };
    let path = format!("{path}.hyperparameters");
    let hyperparameters = object(&path, settings.remove("hyperparameters"))?;
    if let Some(other) = settings.keys().next() {
        return Err(unknown(&format!("method.{}.{other}", method.name())));
    }
    Ok((method, given(&path, hyperparameters, method)?))
}

fn object(param: &str, value: Option<Value>) -> Result<Option<Map<String, Value>>, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => {
            Err(ApiError::invalid(param, format!("`{param}` must be an object, not {other}")))
        }
    }
}

fn given(path: &str, wire: Option<Map<String, Value>>, method: Method) -> Result<Given, ApiError> {
    let mut given = Given::default();
    for (field, value) in wire.unwrap_or_default() {
        let param = format!("{path}.{field}");
        let number = || auto_or_number(&param, &value);
        match field.as_str() {
            "n_epochs" => given.n_epochs = whole(&param, number()?)?,
            "batch_size" => given.batch_size = whole(&param, number()?)?,
            "learning_rate_multiplier" => given.learning_rate_multiplier = number()?,
            "beta" if method == Method::Dpo => given.beta = number()?,
            _ => return Err(unknown(&param)),
        }
    }
    Ok(given)
}

fn auto_or_number(param: &str, value: &Value) -> Result<Option<Auto<f64>>, ApiError> {
    match value {
        Value::Null => return Ok(None),
        Value::String(word) if word == "auto" => return Ok(Some(Auto::Auto)),
        Value::Bool(_)
        | Value::String(_)
        | Value::Number(_)
        | Value::Array(_)
        | Value::Object(_) => {}
    }
    match value.as_f64() {
        Some(AZURE_AUTO) => Ok(Some(Auto::Auto)),
        Some(number) => Ok(Some(Auto::Value(number))),
        None => {
            let message = format!("`{param}` must be \"auto\" or a number, not {value}");
            Err(ApiError::invalid(param, message))
        }
    }
}

fn whole(param: &str, value: Option<Auto<f64>>) -> Result<Option<Auto<u32>>, ApiError> {
    let Some(Auto::Value(number)) = value else { return Ok(value.map(|_| Auto::Auto)) };
    if number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number) {
        return Ok(Some(Auto::Value(number as u32)));
    }
    let message = format!("`{param}` must be \"auto\" or a whole number from 1, not {number}");
    Err(ApiError::invalid(param, message))
}

fn merged(top: Given, nested: Given, method: Method) -> Result<Hyperparameters, ApiError> {
    let beta = either("beta", top.beta, nested.beta)?;
    Ok(Hyperparameters {
        n_epochs: either("n_epochs", top.n_epochs, nested.n_epochs)?,
        batch_size: either("batch_size", top.batch_size, nested.batch_size)?,
        learning_rate_multiplier: either(
            "learning_rate_multiplier",
            top.learning_rate_multiplier,
            nested.learning_rate_multiplier,
        )?,
        beta: (method == Method::Dpo).then_some(beta),
    })
}

/// `hyperparameters` is the old place and `method` the new one; some clients fill in both.
fn either<T: PartialEq>(
    field: &str,
    top: Option<Auto<T>>,
    nested: Option<Auto<T>>,
) -> Result<Auto<T>, ApiError> {
    match (top, nested) {
        (Some(top), Some(nested)) if top != nested => {
            let message = format!("`hyperparameters.{field}` says something else than `method`");
            Err(ApiError::invalid(&format!("hyperparameters.{field}"), message))
        }
        (top, nested) => Ok(nested.or(top).unwrap_or(Auto::Auto)),
    }
}

fn integrations(wire: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    for (index, integration) in wire.iter().enumerate() {
        let invalid = |field: &str, message: &str| {
            let param = format!("integrations[{index}]{field}");
            Err(ApiError::invalid(&param, format!("`{param}` {message}")))
        };
        if !integration.is_object() {
            return invalid("", "must be an object");
        }
        if integration["type"] != "wandb" {
            return invalid(".type", "must be \"wandb\"");
        }
        let wandb = &integration["wandb"];
        if !wandb["project"].as_str().is_some_and(|project| !project.is_empty()) {
            return invalid(".wandb.project", "is required");
        }
        for field in ["name", "entity"] {
            if !(wandb[field].is_null() || wandb[field].is_string()) {
                return invalid(&format!(".wandb.{field}"), "must be a string");
            }
        }
        let tags = wandb["tags"].as_array().map_or(&[][..], Vec::as_slice);
        let is_list = wandb["tags"].is_null() || wandb["tags"].is_array();
        if !is_list || !tags.iter().all(Value::is_string) {
            return invalid(".wandb.tags", "must be a list of strings");
        }
    }
    Ok(wire)
}

/// `true` is the operator's gate, or the usual one; `false` is none, which an operator's does not allow.
fn gate(wire: Option<Value>, config: &JobsConfig) -> Result<Option<Gate>, ApiError> {
    match wire {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(false)) if config.gate.is_none() => Ok(None),
        Some(Value::Bool(false)) => {
            Err(ApiError::invalid("gate", "`gate` cannot be switched off on this server"))
        }
        Some(Value::Bool(true)) => Ok(Some(config.gate.clone().unwrap_or_default())),
        Some(gate @ Value::Object(_)) => serde_json::from_value::<Gate>(gate)
            .map(Some)
            .map_err(|error| ApiError::invalid("gate", format!("`gate`: {error}"))),
        Some(other) => {
            let message = format!(
                "`gate` must be true or {{\"metric\", \"min_gain\", \"p_value\"}}, not {other}"
            );
            Err(ApiError::invalid("gate", message))
        }
    }
}
